"""The packed form of an N:M weight: blocks of 64 channels, with the kept values and a code of their channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.product.int4 import (
    LARGEST,
    SMALLEST,
    apart,
    exact_scale,
    joined,
    nearest_steps,
    pack_pairs,
    pack_scales,
    search_scale,
    unpack_pairs,
    unpack_scales,
)
from permprune.kernels.product.layout import BLOCK, CODE, PART, Layout, type_name
from permprune.pattern import Pattern
from permprune.system.device import INT4

AT_ONCE = 1 << 20
"""Number of weights that are packed or unpacked at a time by PyTorch, so that what is computed stays in the cache."""
FIRST_TWO = 4
"""The code of a group of 2:4 of which the first two channels are kept: positions 0 and 1."""
DAMAGED = "the file is damaged, pack the model again"


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (rows, width) that keeps `pattern.n` of every `pattern.m` consecutive weights of a row.

    `blocks` is uint8 (rows, `layout.row_bytes`): the blocks of 64 channels of a row one after the other, so that a
    product reads memory from front to back. Each block holds 8 bytes of code, of integers a scale, and the kept
    weights in channel order (`Layout`).
    """

    layout: Layout
    blocks: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.blocks.nbytes

    @classmethod
    def pack(
        cls, weight: Tensor, pattern: Pattern, dtype: torch.dtype | None = None, scale: Tensor | None = None
    ) -> PackedWeight:
        """Pack a floating-point weight (rows, width) whose groups have at most n non-zeros.

        Values are stored as `dtype`, by default the type of the weight. int8 rounds each block of 64 channels of a row
        to 255 steps from minus its largest magnitude to its largest magnitude. int4 rounds to steps (`int4`) of a size
        that is searched for each 16 channels (`search_scale`), unless the rows are such steps already or the size is
        given as `scale`, bf16 (rows, parts of a row). On the meta device the blocks are to be filled from a checkpoint.
        Raises `PermpruneError` as `layout_of`.
        """
        layout = cls.layout_of(weight, pattern, dtype or weight.dtype)
        blocks = torch.empty(weight.shape[0], layout.row_bytes, dtype=torch.uint8, device=weight.device)
        for rows in _parts(*weight.shape) if not weight.is_meta else ():
            blocks[rows] = _blocks_of(weight[rows], layout, None if scale is None else scale[rows])
        return cls(layout, blocks)

    @staticmethod
    def layout_of(weight: Tensor, pattern: Pattern, dtype: torch.dtype) -> Layout:
        """Return the layout in which a weight can be packed.

        Raises `PermpruneError` if the weight does not hold the pattern, is not finite, or does not fit the dtype.
        """
        layout = Layout(pattern, dtype, weight.shape[1])
        if weight.is_meta:
            return layout
        ends = torch.stack(weight.aminmax()) if weight.numel() else weight
        if not ends.isfinite().all():
            raise PermpruneError("a weight to pack is NaN or infinite: repair the checkpoint first")
        if not pattern.holds(weight):
            raise PermpruneError(f"a weight to pack does not hold {pattern}: prune the model to {pattern} first")
        if dtype.is_floating_point and not ends.to(dtype).isfinite().all():
            raise PermpruneError(f"a weight to pack is too large for {type_name(dtype)}: pack as bf16 or fp32")
        largest = float(ends.abs().max()) if weight.numel() else 0.0
        if dtype == INT4 and largest and not SMALLEST <= largest <= LARGEST:
            raise PermpruneError(
                f"the largest weight to pack is {largest:.2g}, which has to be between {SMALLEST:.2g} and "
                f"{LARGEST:.2g} in int4: pack as int8"
            )
        return layout

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (rows, width) with its zeros, rounded to `dtype`."""
        rows, width = self.blocks.shape[0], self.layout.width
        weight = torch.empty(rows, width, dtype=dtype, device=self.blocks.device)
        for lines in _parts(rows, width):
            some = PackedWeight(self.layout, self.blocks[lines])
            values, scale = some.values.float(), some.scale
            if self.layout.positions:
                dense = values.new_zeros(*values.shape[:2], BLOCK).scatter_(-1, some.channels, values)
            else:
                kept = some.kept
                rank = (kept.cumsum(-1) - 1).clamp_(0, values.shape[-1] - 1)
                dense = torch.where(kept, values.gather(-1, rank), 0)
            dense = dense.flatten(1)
            if scale is not None:
                dense *= scale.float().repeat_interleave(self.layout.part, 1)
            weight[lines] = dense[:, :width].to(dtype)
        return weight

    @property
    def kept(self) -> Tensor:
        """Which channels of each block are kept: bool (rows, blocks of a row, 64)."""
        code = self._fields[..., :CODE]
        if not self.layout.positions:
            return unpack_bits(code)
        mask = torch.zeros(*code.shape[:2], BLOCK, dtype=torch.bool, device=code.device)
        return mask.scatter_(-1, self.channels, value=True)

    @property
    def channels(self) -> Tensor:
        """The channel of each value of a block of 2:4, int64 (rows, blocks of a row, slots)."""
        code = self._fields[..., :CODE]
        return unpack_bits(code, 2) + torch.arange(BLOCK // 2, device=code.device) // 2 * 4

    @property
    def values(self) -> Tensor:
        """The values of each block in the stored type, (rows, blocks of a row, slots); a view of `blocks`.

        Of int4 they are a new tensor in int8, of steps of the scale.
        """
        stored = self._fields[..., self.layout.header :]
        if self.layout.dtype != INT4:
            return stored.view(self.layout.dtype)
        integers = unpack_pairs(stored)
        return joined(integers, self.channels) if self.layout.positions else integers

    @property
    def scale(self) -> Tensor | None:
        """Of integers, the value of one step in each `layout.part` channels, (rows, parts of a row)."""
        if self.layout.scale is None:
            return None
        stored = self._fields[..., CODE : self.layout.header]
        return unpack_scales(stored).flatten(1) if self.layout.dtype == INT4 else stored.view(torch.float32).squeeze(-1)

    @property
    def _fields(self) -> Tensor:
        return self.blocks.view(len(self.blocks), self.layout.count, -1)

    def check(self, name: str = "a packed weight") -> None:
        """Raise `PermpruneError` unless shape, type and codes are valid and all values and scales are finite.

        For tensors on the meta device only shape and type are checked.
        """
        self.layout.require(self.blocks, name=name)
        if self.blocks.is_meta:
            return
        for what, numbers in (("value", self.values), ("scale", self.scale)):
            if numbers is not None and numbers.is_floating_point() and not torch.isfinite(numbers).all():
                raise PermpruneError(f"{name} holds a {what} that is NaN or infinite: {DAMAGED}")
        row = self._row_off_pattern()
        if row is not None:
            raise PermpruneError(f"{name} does not keep {self.layout.pattern} in row {row}: {DAMAGED}")

    def _row_off_pattern(self) -> int | None:
        """Return the first row whose codes do not keep n of every m channels, or None.

        Channels after the width are not kept; in codes of positions they are the first two of their groups. Positions
        ascend, except in int4.
        """
        layout, code = self.layout, self._fields[..., :CODE].flatten(1)
        if layout.positions:
            bad = torch.zeros(len(code), dtype=torch.bool, device=code.device)
            for side, groups in enumerate((code & 15, code >> 4)):
                first, second = groups & 3, groups >> 2
                bad |= (first == second if layout.dtype == INT4 else first >= second).any(1)
                bad |= (groups[:, (layout.width // 4 + 1 - side) // 2 :] != FIRST_TWO).any(1)
        else:
            kept = unpack_bits(code)
            counts = kept[:, : layout.width].unflatten(1, (-1, layout.pattern.m)).sum(-1, dtype=torch.uint8)
            bad = (counts != layout.pattern.n).any(1) | kept[:, layout.width :].any(1)
        return int(bad.int().argmax()) if bad.any() else None


def pack_bits(numbers: Tensor, bits: int = 1) -> Tensor:
    """Convert numbers of so many bits, (..., count), to bytes, uint8 (..., ceil(count bits / 8)).

    The low bits of a byte hold the first number, and what the last byte has room for is zero.
    """
    places = 2.0 ** torch.arange(0, 8, bits, device=numbers.device)
    padded = F.pad(numbers.float(), (0, -numbers.shape[-1] % len(places)))
    packed: Tensor = padded.unflatten(-1, (-1, len(places))) @ places
    return packed.to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int = 1) -> Tensor:
    """Undo `pack_bits`: bool for one bit, else int64."""
    if bits == 1 and packed.is_cpu and not torch.compiler.is_compiling():  # in a fiftieth of the time
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little").view(bool))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields: Tensor = (packed.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)
    return fields.bool() if bits == 1 else fields.long()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127 as fp32 (rows, width), and the scale of each block, (rows, blocks of a row)."""
    blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1) / 127
    steps = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().clamp(-127, 127).flatten(1)[:, : weight.shape[1]], scale


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Divide the rows of a weight into parts of about `AT_ONCE` weights."""
    step = max(1, AT_ONCE // max(1, width))
    return (slice(first, first + step) for first in range(0, rows, step))


def _blocks_of(weight: Tensor, layout: Layout, scale: Tensor | None) -> Tensor:
    """Return the blocks, uint8 (rows, row_bytes), of a weight that holds the pattern, with these scales of int4."""
    padding = (0, layout.count * BLOCK - layout.width)
    kept = F.pad(layout.pattern.mask(weight.abs()), padding)
    if layout.positions:  # groups after the width keep two channels, too
        kept[:, layout.width :] = torch.arange(padding[1], device=kept.device) % 4 < 2
    header: list[Tensor] = []
    if layout.dtype == torch.int8:
        weight, scale = quantize(weight.float())
        header = [scale.contiguous().unsqueeze(-1).view(torch.uint8)]
    elif layout.dtype == INT4:
        blocks = F.pad(weight.float(), padding).unflatten(1, (-1, BLOCK))
        scale = _scale_of(blocks, layout) if scale is None else scale.unflatten(1, (layout.count, -1))
        parts, header = blocks.unflatten(2, (-1, PART)), [pack_scales(scale)]
        weight = nearest_steps(parts, scale.float(), paired=layout.positions).flatten(1)[:, : layout.width]
    kept, padded = (part.unflatten(1, (-1, BLOCK)) for part in (kept, F.pad(weight, padding)))
    channels = (~kept).to(torch.uint8).argsort(stable=True, dim=-1)[..., : layout.slots]  # the kept ones first
    values = torch.where(kept.gather(-1, channels), padded.gather(-1, channels), 0)
    if layout.dtype == INT4 and layout.positions:
        values, channels = apart(values, channels)
    values = pack_pairs(values) if layout.dtype == INT4 else values.to(layout.dtype)
    code = pack_bits(channels % 4, 2) if layout.positions else pack_bits(kept)
    return torch.cat([code, *header, values.contiguous().view(torch.uint8)], -1).flatten(1)


def _scale_of(weight: Tensor, layout: Layout) -> Tensor:
    """Return the scales of int4, bf16 (rows, blocks, parts), of a weight in fp32, (rows, blocks, 64)."""
    scale = exact_scale(weight, paired=layout.positions)
    return search_scale(weight, paired=layout.positions) if scale is None else scale
