"""A Triton kernel for the placement costs of the search, for GPUs.

On the CPU, tests run it in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHANNELS, GROUPS, LINES = 16, 16, 32
"""Channels and groups per Triton program, and rows that it processes at a time."""


@triton.jit
def _place(
    score, cost, threshold, rival, sums, count, rows,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    total = tl.zeros((CHANNELS, GROUPS), tl.float32)
    for first in range(0, rows, LINES):
        row = first + tl.arange(0, LINES)
        at = channel[:, None] * rows + row[None, :]
        to = group[:, None] * rows + row[None, :]
        has_channel = (channel < count)[:, None] & (row < rows)[None, :]
        has_group = (group < count)[:, None] & (row < rows)[None, :]
        scores = tl.load(score + at, mask=has_channel, other=0)[:, None, :]
        costs = tl.load(cost + at, mask=has_channel, other=0)[:, None, :]
        limits = tl.load(threshold + to, mask=has_group, other=0)[None, :, :]
        rivals = tl.load(rival + to, mask=has_group, other=0)[None, :, :]
        total += tl.sum(tl.where(scores > limits, rivals - costs, 0.0), axis=2)
    inside = (channel < count)[:, None] & (group < count)[None, :]
    tl.store(sums + channel[:, None] * count + group[None, :], total, mask=inside)


def place(score: Tensor, cost: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    """Return the sum over rows r of rival[g, r] - cost[c, r] where score[c, r] > threshold[g, r], as a matrix (c, g).

    All four arguments are fp32 (k, rows), and the result is fp32 (k, k).
    """
    count, rows = score.shape
    sums = score.new_empty(count, count)
    matrices = [matrix.contiguous() for matrix in (score, cost, threshold, rival)]
    grid = (triton.cdiv(count, CHANNELS), triton.cdiv(count, GROUPS))
    _place[grid](*matrices, sums, count, rows, CHANNELS=CHANNELS, GROUPS=GROUPS, LINES=LINES)
    return sums
