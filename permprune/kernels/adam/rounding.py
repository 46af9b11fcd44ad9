"""Stochastic rounding of fp32 numbers to bf16, so that on average what is smaller than their spacing is not lost."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 0x9E3779B9
"""The difference of the hashed numbers of neighbours, 2**32 over the golden ratio."""

CHUNK = {"cpu": 2**15}
"""Elements that are added at a time, by type of device: they stay in the processor's cache."""


def rounded(value: Tensor, seed: int) -> Tensor:
    """Round fp32 numbers to bf16 stochastically, with the random bits of `noise` in kernels/adam/kernels.h."""
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
    size = CHUNK.get(total.device.type, 2**24)
    chunks = zip(total.view(-1).split(size), value.reshape(-1).split(size), strict=True)
    for number, (sums, values) in enumerate(chunks):
        sums.copy_(rounded(sums.float().add_(values), (seed + number * size * STEP) % 2**32))
