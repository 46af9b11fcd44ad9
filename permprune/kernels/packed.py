"""The packed form of an N:M weight: the kept values, and a mask with one bit for every channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.pattern import Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""The types in which kept values can be stored."""
BLOCKS = (64, 128)
"""The numbers of channels of a row that can share a scale of int8 values."""
LARGEST_GROUP = 16
WORD = native.WORD


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (rows, width) that keeps `pattern.n` of every `pattern.m` consecutive weights of a row.

    `values` is (rows, width n / m), the kept weights of each row in channel order: fp32, bf16, fp16 or int8.
    `mask` is uint8 (rows, 8 ceil(width / 64)): bit c % 8 of byte c // 8 is set if channel c is kept, and the bits after
    the width are zero. This costs m / n bits for each kept weight (2:4, 4:8 and 8:16: two), is quick to decode on every
    processor, and cannot refer to a channel that does not exist.
    `scale` is fp32 (rows, ceil(width / block)), for int8 only: a weight is its integer times the scale of its block.
    """

    pattern: Pattern
    values: Tensor
    mask: Tensor
    scale: Tensor | None = None
    block: int = 64

    @property
    def width(self) -> int:
        """The number of channels of a row."""
        return self.values.shape[1] // self.pattern.n * self.pattern.m

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.values.nbytes + self.mask.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @classmethod
    def pack(cls, weight: Tensor, pattern: Pattern, dtype: torch.dtype | None = None, block: int = 64) -> PackedWeight:
        """Pack a floating-point weight (rows, width) whose groups have at most n non-zeros.

        Values are stored as `dtype`, by default the type of the weight. int8 rounds each block of `block` channels of a
        row to 255 steps from minus its largest magnitude to its largest magnitude. Raises `PermpruneError` if the
        weight does not hold the pattern, is not finite, or does not fit the dtype.
        """
        dtype = dtype or weight.dtype
        require_supported(pattern, dtype, block)
        pattern.require_divisible(weight.shape[1], "a weight matrix")
        if not torch.isfinite(weight).all():
            raise PermpruneError("a weight to pack is NaN or infinite: repair the checkpoint first")
        if not pattern.holds(weight):
            raise PermpruneError(f"a weight to pack does not hold {pattern}: prune the model to {pattern} first")
        kept = pattern.mask(weight.abs())
        scale = None
        if dtype == torch.int8:
            weight, scale = quantize(weight.float(), block)
        values = weight[kept].view(weight.shape[0], -1).to(dtype)
        if not torch.isfinite(values).all():
            raise PermpruneError(f"a weight to pack is too large for {_name(dtype)}: pack as bf16 or fp32")
        return cls(pattern, values, pack_bits(kept), scale, block)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (rows, width) with its zeros, rounded to `dtype`."""
        values = self.values.float()
        weight = torch.zeros(values.shape[0], self.width, device=values.device)
        weight[unpack_bits(self.mask, self.width)] = values.flatten()
        if self.scale is not None:
            weight *= self.scale.repeat_interleave(self.block, 1)[:, : self.width]
        return weight.to(dtype)

    def check(self, name: str = "a packed weight") -> None:
        """Raise `PermpruneError` unless shapes, types and masks are valid and all values and scales are finite.

        For tensors on the meta device only shapes and types are checked.
        """
        require_supported(self.pattern, self.values.dtype, self.block)
        native.require_layout(
            self.values, self.mask, self.scale, n=self.pattern.n, m=self.pattern.m, block=self.block, name=name
        )
        if self.values.is_meta:
            return
        for what, numbers in (("value", self.values), ("scale", self.scale)):
            if numbers is not None and not torch.isfinite(numbers).all():
                raise PermpruneError(f"{name} holds a {what} that is NaN or infinite: {DAMAGED}")
        row = self._row_off_pattern()
        if row is not None:
            raise PermpruneError(f"{name} does not keep {self.pattern} in row {row}: {DAMAGED}")

    def _row_off_pattern(self) -> int | None:
        """Return the first row whose mask does not keep n of every m channels or has bits after the width, or None."""
        if native.available() and self.mask.device.type == "cpu":
            return native.row_off_pattern(self.mask, self.width, self.pattern.n, self.pattern.m)
        bits = unpack_bits(self.mask, self.mask.shape[1] * 8)
        groups = bits[:, : self.width].unflatten(1, (-1, self.pattern.m))
        bad = (groups.sum(-1) != self.pattern.n).any(-1) | bits[:, self.width :].any(-1)
        return int(bad.int().argmax()) if bad.any() else None


DAMAGED = "the file is damaged, pack the model again"


def pack_bits(kept: Tensor) -> Tensor:
    """Convert bool (rows, width) to the mask of a `PackedWeight`, uint8 (rows, 8 ceil(width / 64))."""
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % WORD)).unflatten(1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=kept.device)
    mask: Tensor = (padded << shifts).sum(-1, dtype=torch.uint8)
    return mask


def unpack_bits(mask: Tensor, width: int) -> Tensor:
    """Return the first `width` bits of each row of a mask: bool (rows, width)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits: Tensor = (mask.unsqueeze(-1) >> shifts & 1).bool().flatten(1)
    return bits[:, :width]


def quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127 as fp32 (rows, width), and the scale of each block, (rows, blocks)."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    scale = blocks.abs().amax(-1) / 127
    steps = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().clamp(-127, 127).flatten(1)[:, : weight.shape[1]], scale


def require_supported(pattern: Pattern, dtype: torch.dtype, block: int) -> None:
    """Raise `PermpruneError` for a pattern, a type or a block of scales for which there is no packed form."""
    if pattern.m > LARGEST_GROUP:
        raise PermpruneError(f"{pattern} cannot be packed: M is at most {LARGEST_GROUP}")
    if dtype not in DTYPES:
        raise PermpruneError(f"weights cannot be packed as {_name(dtype)}: choose {', '.join(map(_name, DTYPES))}")
    if block not in BLOCKS:
        raise PermpruneError(f"a scale for {block} channels is not supported: choose {' or '.join(map(str, BLOCKS))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
