"""Integers of four bits: from -8 to 7, with a signed scale in bf16 for each block.

The sign of the scale decides whether the largest positive or the largest negative weight has eight steps, as in Q4_0 of
llama.cpp. Scales are so short that their multiples are exact in bf16: what is unpacked, and packed again, is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.kernels.product.layout import BLOCK

SCALE_BITS = 5
"""Significant bits of a searched scale; with the three of an integer they are those of bf16."""

SHARES = [step / 32 for step in range(24, 36)]
"""Scales that are tried, as shares of that with which the largest weight is exact."""


def search_scale(weights: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the scale, bf16 (...), with which rounding blocks of kept weights in fp32, (..., slots), costs least.

    The cost is the sum of squared errors, each times its `importance`, (..., slots), by default one. Scales have
    `SCALE_BITS` significant bits.
    """
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(largest, dtype=torch.bfloat16)
    least = torch.full_like(largest, torch.inf)
    for share in SHARES:
        mantissa, exponent = torch.frexp(largest * (share / -8))
        scale = torch.ldexp((mantissa * 2**SCALE_BITS).round(), exponent - SCALE_BITS).bfloat16()
        errors = (round_to_int4(weights, scale.squeeze(-1)) * scale.float()).sub_(weights).square_()
        cost = (errors if importance is None else errors.mul_(importance)).sum(-1, keepdim=True)
        is_less = cost < least
        best, least = torch.where(is_less, scale, best), torch.where(is_less, cost, least)
    return best.squeeze(-1)


def exact_scale(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales, bf16 (...), of blocks of fp32 weights, (..., slots), that are steps already, and which these are.

    The latter is bool (...).
    """
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales, is_exact = torch.zeros_like(largest, dtype=torch.bfloat16), torch.zeros_like(largest, dtype=torch.bool)
    for steps in range(1, 9):
        scale = (largest / -steps).bfloat16()
        exact = (round_to_int4(weights, scale) * scale.float().unsqueeze(-1) == weights).all(-1)
        scales, is_exact = torch.where(exact, scale, scales), is_exact | exact
    return scales, is_exact


def stored_values(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the values, fp32 (rows, channels), that int4 of these scales, bf16 (rows, blocks), stores for a weight."""
    each = scale.float().repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return round_to_int4(weight.float().unsqueeze(-1), each).squeeze(-1).mul_(each)


def round_to_int4(weights: Tensor, scale: Tensor) -> Tensor:
    """Return the integers, in fp32 (..., slots), that are nearest to weights in fp32 divided by their scale (...)."""
    steps = weights / scale.float().unsqueeze(-1)
    return steps.round_().clamp_(-8, 7).nan_to_num_(0)  # NaN where a scale is zero


def pack_pairs(integers: Tensor) -> Tensor:
    """Convert integers from -8 to 7, (..., 2 k), to bytes, uint8 (..., k), of which the low bits hold the first."""
    first, second = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    pairs: Tensor = first | second << 4
    return pairs


def unpack_pairs(pairs: Tensor) -> Tensor:
    """Undo `pack_pairs`."""
    integers = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    return integers.to(torch.int8) - 8
