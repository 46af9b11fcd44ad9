"""Stochastic rounding of fp32 numbers to bf16, so that on average what is smaller than their spacing is not lost."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 0x9E3779B9
"""The difference of the hashed numbers of neighbours, 2**32 over the golden ratio."""

CACHED, CHUNK = 2**15, 2**22
"""Elements that are added at a time on a CPU, where they stay in the processor's cache, and on other devices."""


def rounded(value: Tensor, seed: int) -> Tensor:
    """Round fp32 numbers, (count,), to bf16 stochastically, with random bits that depend on their places and `seed`."""
    parts = value.split(_size(value))
    return torch.cat(
        [_rounded(part, place) for part, place in zip(parts, _seeds(value, seed, len(parts)), strict=True)]
    )


def _rounded(value: Tensor, seed: int) -> Tensor:
    """The same at once, with the random bits of `noise` in kernels/adam/kernels.h: its bits take 24 bytes a number."""
    low = 2**32 - 1
    bits = (seed + torch.arange(value.numel(), device=value.device) * STEP) & low
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & low
    bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & low
    noise = ((bits ^ bits >> 16) & 0xFFFF).int() * value.isfinite()
    return (((value.view(torch.int32) + noise) >> 16) << 16).view(torch.float32).bfloat16()


def add_rounded_(total: Tensor, value: Tensor, seed: int) -> None:
    """Add a tensor of any type to a contiguous bf16 tensor of its shape, in place; the sums are rounded stochastically.

    `seed`, from 0 to 2**32 - 1, has to differ from call to call.
    """
    size = _size(total)
    parts = total.view(-1).split(size)
    for sums, values, place in zip(parts, value.reshape(-1).split(size), _seeds(total, seed, len(parts)), strict=True):
        sums.copy_(_rounded(sums.float().add_(values), place))


def _size(tensor: Tensor) -> int:
    """The number of elements of a part."""
    return CACHED if tensor.is_cpu else CHUNK


def _seeds(tensor: Tensor, seed: int, count: int) -> list[int]:
    """The seed of each of the `count` parts of a tensor, which gives the bits of the whole tensor's `seed`."""
    return [(seed + number * _size(tensor) * STEP) % 2**32 for number in range(count)]
