"""Codes of the channels that a token keeps in a pruned key/value cache, and magnitudes in four bits.

For N:M with M = 4, a code has some planes, each with one bit for each group of four channels. A plane has
ceil(groups / 8) bytes, and the bit of group g is bit g % 8 of byte g // 8. Every code of these patterns keeps exactly N
channels of each group.

* 2:4, three planes: whether channel 0 is kept; whether channel 1 is kept or pruned like channel 0; whether channel 2
  is. If neither is, channel 3 is. If both bits are set, the last one is ignored.
* 1:4, two planes: the lower and the higher bit of the position of the channel that is kept.
* 3:4, two planes: likewise, of the channel that is not kept.

For other patterns it has a bit for every channel: bit c % 8 of byte c // 8 is set if channel c is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.kernels.product.packed import pack_bits, unpack_bits
from permprune.pattern import Pattern

INT5 = torch.uint8
"""The type of tensors of kept values of five bits: two places in `MAGNITUDES` in each byte, the first in its lower
bits. Their signs are stored elsewhere."""

MAGNITUDES = (0, 3, 8, 13, 20, 27, 35, 44, 53, 62, 72, 82, 93, 104, 115, 127)
"""The magnitudes of kept values of five bits: 127 (i / 15)^1.4, rounded. Small values, of which there are more, are
closer to each other, which lowers the error of values by about a tenth against equal steps."""

PLANES = {Pattern(1, 4): 2, Pattern(2, 4): 3, Pattern(3, 4): 2}
"""The number of planes of each pattern."""


def code_bytes(pattern: Pattern, width: int) -> int:
    """Return the bytes of the code of `width` channels."""
    planes = PLANES.get(pattern)
    return -(-width // 8) if planes is None else planes * -(-width // 32)


def kept_count(pattern: Pattern | None, width: int) -> int:
    """Return how many of `width` channels are kept; all without a pattern."""
    return width if pattern is None else width // pattern.m * pattern.n


def pack_code(kept: Tensor, pattern: Pattern) -> Tensor:
    """Return the codes, uint8 (..., bytes), of channels of which each group keeps N: bool (..., width)."""
    if pattern not in PLANES:
        return pack_padded_bits(kept)
    first, *others = kept.unflatten(-1, (-1, 4)).unbind(-1)
    if pattern.n == 2:
        planes = [first, first == others[0], first == others[1]]
    else:
        one = kept if pattern.n == 1 else ~kept
        _, second, third, fourth = one.unflatten(-1, (-1, 4)).unbind(-1)
        planes = [second | fourth, third | fourth]
    return pack_padded_bits(torch.stack(planes, -2)).flatten(-2)


def unpack_code(code: Tensor, pattern: Pattern, width: int) -> Tensor:
    """Undo `pack_code`: bool (..., width)."""
    if pattern not in PLANES:
        return unpack_bits(code)[..., :width]
    planes = unpack_bits(code.unflatten(-1, (PLANES[pattern], -1)))[..., : width // 4].unbind(-2)
    if pattern.n == 2:
        first, one, two = planes
        two = two & ~one
        return torch.stack((first, first == one, first == two, first ^ (one | two)), -1).flatten(-2)
    low, high = planes
    place = torch.stack((~low & ~high, low & ~high, ~low & high, low & high), -1).flatten(-2)
    return place if pattern.n == 1 else ~place


def pack_padded_bits(bits: Tensor) -> Tensor:
    """Convert bool (..., width) to uint8 (..., ceil(width / 8)), with zeros after the width."""
    return pack_bits(F.pad(bits, (0, -bits.shape[-1] % 8)))


def pack_magnitudes(values: Tensor) -> Tensor:
    """Convert numbers from 0 to 127, (..., count), to the nearest of `MAGNITUDES`: uint8 (..., ceil(count / 2))."""
    magnitudes = torch.tensor(MAGNITUDES, dtype=values.dtype, device=values.device)
    places = torch.bucketize(values.contiguous(), (magnitudes[1:] + magnitudes[:-1]) / 2).to(torch.uint8)
    pairs = F.pad(places, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def unpack_magnitudes(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_magnitudes`: uint8 (..., count)."""
    places = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]
    magnitudes: Tensor = torch.tensor(MAGNITUDES, dtype=torch.uint8, device=packed.device)[places.int()]
    return magnitudes
