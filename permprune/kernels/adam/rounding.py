"""Stochastic rounding of fp32 numbers to bf16, so that on average what is smaller than their spacing is not lost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STEP = 0x9E3779B9
"""The difference of the hashed numbers of neighbours, 2**32 over the golden ratio."""

CACHED, CHUNK = 2**15, 2**22
"""Elements that are added at a time on a CPU, where they stay in the processor's cache, and on other devices."""


def rounded(value: Tensor, seed: int) -> Tensor:
    """Round fp32 numbers, (count,), to bf16 stochastically, with random bits that depend on their places and `seed`."""
    result = torch.empty_like(value, dtype=torch.bfloat16)
    for part, place in _parts(value, seed):
        result[part] = _rounded(value[part], place)
    return result


def add_rounded_(total: Tensor, value: Tensor, seed: int) -> None:
    """Add a tensor of any type to a contiguous bf16 tensor of its shape, in place; the sums are rounded stochastically.

    `seed`, from 0 to 2**32 - 1, has to differ from call to call.
    """
    sums, values = total.view(-1), value.reshape(-1)
    for part, place in _parts(sums, seed):
        sums[part] = _rounded(sums[part].float().add_(values[part]), place)


def _parts(tensor: Tensor, seed: int) -> Iterator[tuple[slice, int]]:
    """Yield the parts of a tensor, each with the seed that gives the bits of the whole tensor's `seed`."""
    size = CACHED if tensor.is_cpu else CHUNK
    for start in range(0, len(tensor), size):
        yield slice(start, start + size), (seed + start * STEP) % 2**32


def _rounded(value: Tensor, seed: int) -> Tensor:
    """The same at once, with the random bits of `noise` in kernels/adam/kernels.h: its bits take 24 bytes a number."""
    low = 2**32 - 1
    bits = (seed + torch.arange(value.numel(), device=value.device) * STEP) & low
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & low
    bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & low
    noise = ((bits ^ bits >> 16) & 0xFFFF).int() * value.isfinite()
    return (((value.view(torch.int32) + noise) >> 16) << 16).view(torch.float32).bfloat16()
