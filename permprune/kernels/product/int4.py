"""Integers of four bits, with a scale for each 16 channels.

A kept weight is an integer from -8 to 7 times a scale. In 2:4 it is twice that, or, for both weights of a group of four
channels, twice that plus one: of two lattices of pairs, the second between the points of the first, the nearer one is
taken, which halves the squared error. The order in which the code of a group names its two channels tells which it is,
so that this bit costs none.

The scales of a block are floats with three bits of mantissa that share an exponent of four bits: two bytes together.
Their multiples are exact in bf16, so that what is unpacked, and packed again, is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.kernels.product.layout import BLOCK, PART

LEAST_EXPONENT, EXPONENT_BITS, MANTISSA_BITS = -13, 4, 3
"""The least exponent of scales, and the bits of an exponent and of a mantissa."""

LEVELS = 2**MANTISSA_BITS
"""The scales of a power of two: (1 + level / LEVELS) times it."""

HIGHEST_EXPONENT = LEAST_EXPONENT + 2**EXPONENT_BITS - 1

LARGEST = 7 * (2 - 1 / LEVELS) * 2**HIGHEST_EXPONENT
"""The largest magnitude of a weight, in all patterns."""

SMALLEST = 16 * 2**LEAST_EXPONENT
"""The least magnitude of the largest weight of a layer, from which on it has all steps."""

GROUP, PAIR = 4, 2
"""The channels of a group of 2:4, and those that it keeps."""

TRIED, FROM = 6, 0.8
"""The levels that are tried: the next ones from that on with which the largest weight has this share of all steps."""

FIRST_ROWS = 64
"""The rows that tell first that a weight was not rounded before."""


def search_scale(weights: Tensor, *, paired: bool) -> Tensor:
    """Return the scales, bf16 (..., parts), with the least squared error of rounding blocks of weights, fp32 (..., 64).

    `paired` is whether the pattern is 2:4.
    """
    parts = weights.unflatten(-1, (-1, PART))
    return search_part(parts, search_exponent(parts, paired=paired).unsqueeze(-1), paired=paired)[0]


def search_exponent(parts: Tensor, importance: Tensor | None = None, *, paired: bool) -> Tensor:
    """Return the exponents, int32 (...), of the scales of blocks, (..., parts, 16), for `search_part`."""
    first = _exponent(FROM * _least_scale(parts.abs().amax((-2, -1)), paired))
    second = (first + 1).clamp_(max=HIGHEST_EXPONENT)
    costs = [
        search_part(parts, exponent.unsqueeze(-1), importance, paired=paired)[1].sum(-1) for exponent in (first, second)
    ]
    return torch.where(costs[1] < costs[0], second, first)


def search_part(
    weights: Tensor, exponent: Tensor, importance: Tensor | None = None, *, paired: bool, all_levels: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the scales, bf16 (...), with which rounding parts of weights, fp32 (..., 16), costs least, and the cost.

    `exponent` (...) is that of their blocks. The cost is the sum of squared errors, each times its `importance`, by
    default one. Of the levels, those are tried that suit the largest weight, or `all_levels`.
    """
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    share = FROM * _least_scale(weights.abs().amax(-1), paired) / power
    first = ((share - 1) * LEVELS).floor_().clamp_(0, LEVELS - 1) * (not all_levels)
    best, least = torch.zeros_like(share), torch.full_like(share, torch.inf)
    for level in range(LEVELS if all_levels else TRIED):
        scale = (1 + (first + level).clamp_(max=LEVELS - 1) / LEVELS) * power
        errors = nearest_steps(weights, scale, paired=paired, importance=importance)
        errors.mul_(scale.unsqueeze(-1)).sub_(weights).square_()
        cost = (errors if importance is None else errors.mul_(importance)).sum(-1)
        best, least = torch.where(cost < least, scale, best), torch.minimum(cost, least)
    return best.bfloat16(), least


def exact_scale(weights: Tensor, *, paired: bool) -> Tensor | None:
    """Return scales, bf16 (rows, blocks, parts), of which weights, fp32 (rows, blocks, 64), are steps, or None."""
    if len(weights) > FIRST_ROWS and exact_scale(weights[:FIRST_ROWS], paired=paired) is None:
        return None
    parts = weights.unflatten(-1, (-1, PART))
    found = torch.zeros(parts.shape[:-1], dtype=torch.bfloat16, device=weights.device)
    is_exact = torch.zeros(weights.shape[:-1], dtype=torch.bool, device=weights.device)
    lowest = _exponent(_least_scale(weights.abs().amax(-1), paired) / 2)
    for more in range(7):
        exponent = (lowest + more).clamp_(max=HIGHEST_EXPONENT)
        scale, cost = search_part(parts, exponent.unsqueeze(-1), paired=paired, all_levels=True)
        exact = (cost == 0).all(-1) & ~is_exact
        found, is_exact = torch.where(exact.unsqueeze(-1), scale, found), is_exact | exact
    return found if is_exact.all() else None


def stored_values(weight: Tensor, scale: Tensor, *, paired: bool) -> Tensor:
    """Return the values, fp32 (rows, channels), that int4 of these scales, bf16 (rows, parts), stores for a weight."""
    channels = weight.shape[1]
    whole = F.pad(weight.float(), (0, scale.shape[1] * PART - channels)).unflatten(1, (-1, PART))
    steps = nearest_steps(whole, scale.float(), paired=paired)
    return steps.mul_(scale.float().unsqueeze(-1)).flatten(1)[:, :channels]


def nearest_steps(weights: Tensor, scale: Tensor, *, paired: bool, importance: Tensor | None = None) -> Tensor:
    """Return the integers, fp32 (..., channels), of weights in fp32 divided by their scale (...), as they are stored.

    With `paired`, those of a group of four channels are all even or, if two are kept, all odd, whichever costs less
    with their `importance`, by default one. Weights that are zero are not kept.
    """
    steps = weights / scale.unsqueeze(-1)
    if not paired:
        return steps.round_().clamp_(-8, 7)
    steps, kept = steps.unflatten(-1, (-1, GROUP)), weights.unflatten(-1, (-1, GROUP)) != 0
    even, odd_steps = round_to(steps, 0.0), round_to(steps, 1.0).mul_(kept)
    difference = (odd_steps - steps).square_().sub_((even - steps).square_())
    if importance is not None:
        difference.mul_(importance.unflatten(-1, (-1, GROUP)))
    is_odd = (difference.sum(-1) < 0) & (kept.sum(-1) == PAIR)
    return torch.where(is_odd.unsqueeze(-1), odd_steps, even).flatten(-2)


def round_to(steps: Tensor, odd: float | Tensor) -> Tensor:
    """Return the even integers that are nearest to steps, or, where `odd` is 1 and not 0, the odd ones."""
    rounded: Tensor = (steps - odd).mul_(0.5).round_().clamp_(-8, 7).mul_(2)
    return rounded.add_(odd)


def _least_scale(largest: Tensor, paired: bool) -> Tensor:
    """The scales with which the largest weight has all steps."""
    return largest / (16 if paired else 8)


def _exponent(scale: Tensor) -> Tensor:
    """The exponents, int32 (...), of the largest powers of two that are no larger than scales, as far as there are."""
    return (torch.frexp(scale)[1] - 1).clamp_(LEAST_EXPONENT, HIGHEST_EXPONENT)


def apart(steps: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of four bits of pairs of steps, and the channels in the order that tells odd ones.

    Both are (..., slots), the two of a group side by side, and the channels of a group ascend.
    """
    steps, channels = (tensor.unflatten(-1, (-1, PAIR)) for tensor in (steps, channels))
    odd = steps[..., :1] % 2
    integers = (steps - odd) / 2
    turned = odd != 0
    integers, channels = (torch.where(turned, pairs.flip(-1), pairs).flatten(-2) for pairs in (integers, channels))
    return integers, channels


def joined(integers: Tensor, channels: Tensor) -> Tensor:
    """Undo `apart` for integers, int8 (..., slots), and their channels; returns the steps in the order of these."""
    first, second = channels.unflatten(-1, (-1, PAIR)).unbind(-1)
    odd: Tensor = (first > second).to(torch.int8).repeat_interleave(PAIR, -1)
    return odd.add_(integers, alpha=2)


def pack_scales(scale: Tensor) -> Tensor:
    """Convert scales, bf16 (..., 4), whose blocks share an exponent, to bytes, uint8 (..., 2)."""
    mantissa, exponent = torch.frexp(scale.float())
    level = ((mantissa * 2 - 1) * LEVELS).to(torch.int32)
    bits = (level << _shifts(scale)).sum(-1) | (exponent[..., 0] - 1 - LEAST_EXPONENT) << 16 - EXPONENT_BITS
    return torch.stack([bits & 255, bits >> 8], -1).to(torch.uint8)


def unpack_scales(packed: Tensor) -> Tensor:
    """Undo `pack_scales`."""
    bits = packed[..., :1].int() | packed[..., 1:].int() << 8
    mantissa = 1 + (bits >> _shifts(packed) & LEVELS - 1) / LEVELS
    return torch.ldexp(mantissa, (bits >> 16 - EXPONENT_BITS) + LEAST_EXPONENT).bfloat16()


def _shifts(tensor: Tensor) -> Tensor:
    return torch.arange(BLOCK // PART, dtype=torch.int32, device=tensor.device) * MANTISSA_BITS


def pack_pairs(integers: Tensor) -> Tensor:
    """Convert integers from -8 to 7, (..., 2 k), to bytes, uint8 (..., k), of which the low bits hold the first."""
    first, second = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    pairs: Tensor = first | second << 4
    return pairs


def unpack_pairs(pairs: Tensor) -> Tensor:
    """Undo `pack_pairs`."""
    integers = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    return integers.to(torch.int8) - 8
