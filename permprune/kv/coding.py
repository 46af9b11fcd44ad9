"""Keys and values in few bits: all channels of a head, scaled and rotated, then numbers of 2 to 6 bits.

After a Hadamard rotation every channel has about the same distribution, so that one scale for each token and head is
enough and the codes of a normal distribution fit (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; TurboQuant, Zandieh
et al. 2025, arXiv 2504.19874). Before it, channels are multiplied by weights, which balance how large they are against
how much their errors matter. The packed parts are `values`, planes of bits (`permprune.kernels.attention.states`), and
`scale`, bf16.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from permprune.kernels.attention.states import (
    CODED,
    MAGNITUDES,
    UNITS,
    numbered,
    pack_planes,
    unpack_planes,
)

BITS = sorted(MAGNITUDES)
"""The numbers of bits that a value may have."""

TYPES = {bits: dtype for dtype, bits in CODED.items()}
"""The types of stored values, by bits."""

HALVES = 255
"""Halves of a step from 0 to beyond the largest magnitude."""


@cache
@torch.inference_mode(False)
def hadamard(width: int, device: torch.device) -> Tensor:
    """Return the orthogonal Walsh-Hadamard matrix of the largest power of two in the width, block by block."""
    matrix = torch.ones(1, 1)
    while width % (2 * len(matrix)) == 0:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / 2**0.5
    blocks = torch.eye(width // len(matrix))
    return torch.kron(blocks, matrix).to(device)


def balance(states: Tensor, weight: Tensor) -> Tensor:
    """Return the factors of channels, fp32 (heads, width), with the least error of numbers with one scale for all.

    `states` are (heads, tokens, width), and errors are multiplied by `weight`, (heads, width). With factors d, an error
    of the same size in all rotated channels costs sum (weight / d)^2, and its size is that of d * states.
    """
    size = states.square().mean(1).sqrt()
    factor = (weight / size.clamp_min(size.amax(-1, keepdim=True) * 1e-3 + 1e-12)).sqrt()
    return factor / factor.square().mean(-1, keepdim=True).sqrt()


def code(states: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the parts of rotated states, floating (..., width), with the scale of least error for each token."""
    states = states.float()
    values = numbered(bits, states.device)
    unit = states.square().mean(-1, keepdim=True).sqrt() * UNITS[bits]
    relative = states / unit.clamp_min(torch.finfo(torch.float32).tiny)
    steps = (2 * relative).ceil().clamp(-HALVES, HALVES).nan_to_num(HALVES)
    places = _nearest(bits, states.device)[steps.int() + HALVES]
    nearest = values[places.int()]
    scale = (states * nearest).sum(-1, keepdim=True) / nearest.square().sum(-1, keepdim=True)
    return {"values": pack_planes(places, bits), "scale": scale.bfloat16()}


def decode(parts: dict[str, Tensor], bits: int, width: int) -> Tensor:
    """Return the rotated states that parts stand for, fp32 (..., width)."""
    return numbered(bits, parts["scale"].device)[unpack_planes(parts["values"], width)] * parts["scale"].float()


@cache
@torch.inference_mode(False)
def _nearest(bits: int, device: torch.device) -> Tensor:
    """Return the number nearest to all up to each multiple of half a step, uint8 (2 HALVES + 1,).

    The bounds between magnitudes are such multiples, so that this table replaces a search.
    """
    values, ends = numbered(bits, device), torch.arange(-HALVES, HALVES + 1, device=device) / 2
    return torch.bucketize(ends, (values[1:] + values[:-1]) / 2).to(torch.uint8)
