"""Packed keys and values of tokens: what they consist of, numbers of few bits, and unpacking in native code.

Packed states are named parts, each (batch, heads, tokens, size of the part), as `permprune.kv.packing` describes them.
A code has a bit for every channel: bit c % 8 of byte c // 8 is set if channel c is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product.layout import FLOATS
from permprune.kernels.product.packed import pack_bits, unpack_bits
from permprune.pattern import Pattern

WIDEST = 256
"""The most channels of a head."""

CODED: dict[torch.dtype, int] = {getattr(torch, f"uint{bits}"): bits for bits in range(2, 7)}
"""The bits of a number of each type of few bits. Such numbers are stored in planes of uint8: the first has the lowest
bit of each, and so on. Bit c of a plane is bit c % 8 of byte c // 8."""

MAGNITUDES = {2: (38, 127), 3: (14, 45, 79, 127), 4: (6, 18, 31, 44, 58, 75, 96, 127)} | {
    bits: tuple(range(2 ** (7 - bits), 128, 2 ** (8 - bits))) for bits in (5, 6)
}
"""The magnitudes that numbers of few bits stand for, by bits: up to 4 bits those of a normal distribution with the
least squared error (Max 1960, Quantizing for minimum distortion), rounded; above, equal steps. The lower half of the
numbers stands for the negative ones, from the largest on."""

UNITS = {2: 1.510 / 127, 3: 2.152 / 127, 4: 2.733 / 127, 5: 0.1881 / 8, 6: 0.1041 / 4}
"""The size of a step of the magnitudes, by bits, relative to the root mean square of what is stored."""

SCALED = (torch.int8, *CODED)
"""The types of kept values that are integers, with a scale for each token and head."""

NUMBERS = library.NUMBERS | {dtype: len(library.NUMBERS) + bits - 2 for dtype, bits in CODED.items()}
"""The numbers of the types of kept values in the library."""


class PackedStates:
    """Packed states of tokens as the library reads them, (batch, heads, tokens); they hold the tensors.

    `parts` are as in `permprune.kv.packing`, and `level` is fp32 (heads, width); without a `pattern` all channels are
    kept. Values are of type `dtype`. Raises `PermpruneError` if the parts do not match, or are not contiguous or not on
    the CPU.
    """

    def __init__(self, parts: Mapping[str, Tensor], level: Tensor, pattern: Pattern | None, dtype: torch.dtype) -> None:
        values, (heads, width) = parts["values"], level.shape
        sizes = part_sizes(dtype, width, pattern, recovers="amplitude" in parts)
        fits = parts.keys() == sizes.keys() and values.shape[1] == heads and width <= WIDEST
        for name, part in parts.items() if fits else ():
            size, kind = sizes[name]
            fits &= part.shape == (*values.shape[:3], size) and part.dtype == kind and is_reachable(part)
        if not fits or level.dtype != torch.float32 or not is_reachable(level):
            raise PermpruneError(
                f"packed states of {width} channels have parts that do not match or are not on the CPU"
            )
        self.parts, self.level, self.shape, self.width = dict(parts), level, tuple(values.shape[:3]), width
        self.struct = library.structure(
            "states",
            **parts,
            level=level if "amplitude" in parts else None,
            tokens=values.shape[:3].numel(),
            width=width,
            kept=kept_count(pattern, width),
            code_bytes=parts["code"].shape[-1] if "code" in parts else 0,
            sign_bytes=parts["signs"].shape[-1] if "signs" in parts else 0,
            number=NUMBERS[dtype],
            kind=pattern is not None,
        )

    def unpack(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `first` to `first` + `count`, with pruned channels zero or recovered.

        Returns (batch, heads, count, width) of fp32, bf16 or fp16, in the stored order. Raises `PermpruneError` for
        another type, tokens out of range, or a code that does not keep its pattern.
        """
        batch, heads, tokens = self.shape
        if dtype not in FLOATS or not 0 <= first <= first + count <= tokens:
            raise PermpruneError(f"{count} of {tokens} packed tokens from {first} on cannot be unpacked to {dtype}")
        output = torch.empty(batch, heads, count, self.width, dtype=dtype, device="cpu")
        sizes = {"batch": batch, "heads": heads, "first": first, "count": count, "number": NUMBERS[dtype]}
        library.run("unpack_states", output.numel(), states=self.struct, output=output, **sizes)
        return output


def part_sizes(
    dtype: torch.dtype, width: int, pattern: Pattern | None, *, recovers: bool
) -> dict[str, tuple[int, torch.dtype]]:
    """Return the size and the type of each part of packed states; none for values of a type that is not stored.

    `recovers` is whether pruned channels are recovered by their signs.
    """
    if dtype not in (*SCALED, *FLOATS):
        return {}
    kept = kept_count(pattern, width)
    sizes = {"values": (kept, dtype)}
    if dtype in CODED:
        sizes = {"values": (CODED[dtype] * plane_bytes(width), torch.uint8)}
    if dtype in SCALED:
        sizes["scale"] = (1, torch.bfloat16)
    if pattern is not None:
        sizes["code"] = (-(-width // 8), torch.uint8)
        if recovers:
            sizes["signs"] = (-(-(width - kept) // 8), torch.uint8)
            sizes["amplitude"] = (1, torch.uint8 if dtype in SCALED else dtype)
    return sizes


def token_bytes(dtype: torch.dtype, width: int, pattern: Pattern | None = None, *, recovers: bool = False) -> int:
    """Return the bytes of a token of a head of packed states. Arguments are those of `part_sizes`."""
    return sum(count * kind.itemsize for count, kind in part_sizes(dtype, width, pattern, recovers=recovers).values())


def is_reachable(tensor: Tensor) -> bool:
    """Return whether the library can read a tensor by its pointer alone."""
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def kept_count(pattern: Pattern | None, width: int) -> int:
    """Return how many of `width` channels are kept; all without a pattern."""
    return width if pattern is None else width // pattern.m * pattern.n


def plane_bytes(width: int) -> int:
    """Return the bytes of a plane of numbers of few bits, one for each channel: whole pairs of bytes."""
    return -(-width // 16) * 2


def pack_planes(numbers: Tensor, bits: int) -> Tensor:
    """Convert numbers from 0 to 2^bits - 1, (..., width), to their planes: uint8 (..., bits * plane_bytes)."""
    padded = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[-1] % 16))
    return torch.cat([pack_bits((padded & 1 << plane).bool()) for plane in range(bits)], -1)


def unpack_planes(planes: Tensor, width: int) -> Tensor:
    """Undo `pack_planes`: int64 (..., width)."""
    bits = unpack_bits(planes.unflatten(-1, (-1, plane_bytes(width))))[..., :width].long()
    return (bits << torch.arange(bits.shape[-2], device=planes.device)[:, None]).sum(-2)


@cache
@torch.inference_mode(False)
def numbered(bits: int, device: torch.device) -> Tensor:
    """Return what the numbers of so many bits stand for, fp32 (2^bits,), rising."""
    upper = torch.tensor(MAGNITUDES[bits], dtype=torch.float32)
    return torch.cat((-upper.flip(0), upper)).to(device)
