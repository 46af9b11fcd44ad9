"""Codes of the channels that a token keeps in a pruned key/value cache, and numbers of few bits.

A code has a bit for every channel: bit c % 8 of byte c // 8 is set if channel c is kept.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.kernels.product.packed import pack_bits, unpack_bits
from permprune.pattern import Pattern

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


def kept_count(pattern: Pattern | None, width: int) -> int:
    """Return how many of `width` channels are kept; all without a pattern."""
    return width if pattern is None else width // pattern.m * pattern.n


def pack_padded_bits(bits: Tensor) -> Tensor:
    """Convert bool (..., width) to uint8 (..., ceil(width / 8)), with zeros after the width."""
    return pack_bits(F.pad(bits, (0, -bits.shape[-1] % 8)))


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
