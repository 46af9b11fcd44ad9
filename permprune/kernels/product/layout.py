"""How packed weights are laid out in memory and in files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.pattern import Pattern
from permprune.system.device import INT4

BLOCK = 64
"""Number of channels of a block: the unit of packed rows, and of the scales of integers."""
PART = 16
"""Number of channels that share a scale of int4."""
CODE = 8
"""Bytes of a block that say which channels are kept."""
LARGEST_GROUP = 16
LARGEST_BATCH = 64
"""Largest number of rows of activations that are multiplied by the kernels for few rows."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, INT4)
"""The types in which kept values can be stored."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The types of activations, biases and unpacked weights."""


@dataclass(frozen=True)
class Layout:
    """How a packed weight of some pattern, stored type and width is stored.

    A row is a sequence of `count` blocks of 64 channels, the last padded. A block consists of 8 bytes of code, a scale
    (int8: fp32; int4: two bytes for those of its `part` channels, see `int4`), and `slots` values: the kept weights in
    channel order, then zeros. The code of 2:4 has two bits for each kept weight: its position among the four of its
    group (`positions`). That of another pattern has a bit for each channel. Raises `PermpruneError` for a pattern, type
    or width that cannot be packed.
    """

    pattern: Pattern
    dtype: torch.dtype
    width: int

    def __post_init__(self) -> None:
        require_packable(self.pattern, self.dtype)
        self.pattern.require_divisible(self.width, "a packed weight")

    @property
    def positions(self) -> bool:
        """Whether codes are positions of two bits; if not, masks."""
        return has_positions(self.pattern)

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.width // BLOCK)

    @property
    def slots(self) -> int:
        """Values of a block: as many as a block can keep, padded to a multiple of four bytes (int4: of two)."""
        n, m = self.pattern.n, self.pattern.m
        most = 0
        for first in {BLOCK * block % m for block in range(m)}:  # where in a group a block can begin
            ends = [*range(m - first, BLOCK, m), BLOCK]
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            most = max(most, sum(min(n, size) for size in sizes))
        unit = 4 // self.dtype.itemsize
        return -(-most // unit) * unit

    @property
    def scale(self) -> torch.dtype | None:
        """The type in which the scale of a block of integers is stored; None of other values."""
        return {torch.int8: torch.float32, INT4: torch.int16}.get(self.dtype)

    @property
    def part(self) -> int:
        """Channels that share a scale of integers."""
        return PART if self.dtype == INT4 else BLOCK

    @property
    def header(self) -> int:
        """Bytes of a block before its values."""
        return CODE + (0 if self.scale is None else self.scale.itemsize)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        values = self.slots // 2 if self.dtype == INT4 else self.slots * self.dtype.itemsize
        return self.header + values

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.count * self.block_bytes

    def require(
        self, blocks: Tensor, bias: Tensor | None = None, order: Tensor | None = None, name: str = "a packed weight"
    ) -> None:
        """Raise `PermpruneError` unless the tensors have the shapes and types of a weight, its bias and its order."""
        rows = blocks.shape[0] if blocks.dim() else 0
        expected: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
            ("blocks", blocks, (rows, self.row_bytes), (torch.uint8,)),
            ("bias", bias, (rows,), FLOATS),
            ("order", order, (self.width,), (torch.int64,)),
        ]
        for part, tensor, shape, dtypes in expected:
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                raise PermpruneError(
                    f"{name} has {part} of shape {tuple(tensor.shape)} and type {tensor.dtype}, which do not fit "
                    f"{rows} rows of {self.width} channels in {self.pattern} and {type_name(self.dtype)}: pack the "
                    "model again"
                )
            if tensor.device != blocks.device:
                raise PermpruneError(
                    f"{name} has {part} on {tensor.device} and blocks on {blocks.device}: move them together"
                )


def has_positions(pattern: Pattern) -> bool:
    """Whether the code of a pattern names the positions of what is kept: that of 2:4 does."""
    return (pattern.n, pattern.m) == (2, 4)


def require_packable(pattern: Pattern, dtype: torch.dtype) -> None:
    """Raise `PermpruneError` for a pattern or a type for which there is no packed form."""
    if pattern.m > LARGEST_GROUP:
        raise PermpruneError(f"{pattern} cannot be packed: M is at most {LARGEST_GROUP}")
    if dtype not in DTYPES:
        choices = ", ".join(map(type_name, DTYPES))
        raise PermpruneError(f"weights cannot be packed as {type_name(dtype)}: choose {choices}")


def require_activations(x: Tensor, width: int, stored: Tensor) -> None:
    """Raise `PermpruneError` unless x is (..., width) of one of `FLOATS`, on the device of `stored`, its factor."""
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != width:
        raise PermpruneError(
            f"activations of shape {tuple(x.shape)} and type {x.dtype} do not fit a packed weight of {width} channels: "
            f"give (..., {width}) of fp32, bf16 or fp16"
        )
    if x.device != stored.device:
        raise PermpruneError(f"activations are on {x.device} and packed weights on {stored.device}: move them together")


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type, without "torch."."""
    return str(dtype).removeprefix("torch.")
