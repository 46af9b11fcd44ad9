"""Triton kernels: matrix products with packed weights for small batches, unpacking, and placement costs of the search.

Triton is part of PyTorch's builds for GPUs. On the CPU, tests run the kernels in Triton's interpreter
(`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 64
"""Number of channels in one word of a mask."""

LARGEST_BATCH = 16
"""The maximum rows of activations in one product, which is the smallest tile of a GPU's matrix units."""

ROWS = 32
"""Rows of a weight that one Triton program multiplies or unpacks."""

CHANNELS, GROUPS, LINES = 16, 16, 32
"""Channels and groups per Triton program of `place`, and rows that it processes at a time."""


@triton.jit
def _word(values, mask, start, row, inside, word, words, end):
    """Return 64 channels of some rows, including zeros, and the positions at which the values of the next word start.

    No value at or after the `end` of the tensor is read, even if the mask is damaged.
    """
    channel = tl.arange(0, 64)
    byte = tl.load(mask + row[:, None] * (words * 8) + word * 8 + channel[None, :] // 8, mask=inside[:, None], other=0)
    bit = (byte.to(tl.int32) >> (channel % 8)[None, :]) & 1
    place = start[:, None] + tl.cumsum(bit, axis=1) - bit
    weight = tl.load(values + place, mask=(bit == 1) & (place < end), other=0)
    return weight, start + tl.sum(bit, axis=1)


@triton.jit
def _multiply(
    x, values, mask, scale, bias, y, batch, rows, width, kept, words, blocks,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, NARROW: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    channel, sample = tl.arange(0, 64), tl.arange(0, BATCH)
    start, end = row * kept, rows * kept
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for word in range(words):
        weight, start = _word(values, mask, start, row, inside, word, words, end)
        at = word * 64 + channel
        shown = (at[:, None] < width) & (sample[None, :] < batch)
        read = tl.load(x + sample[None, :] * width + at[:, None], mask=shown, other=0)
        if NARROW:  # both are bf16 or fp16, which matrix units support
            part = tl.dot(weight, read)
        else:
            part = tl.dot(weight.to(tl.float32), read.to(tl.float32), input_precision="ieee")
        if SCALED:
            part *= tl.load(scale + row * blocks + word // BLOCK, mask=inside, other=0)[:, None]
        total += part
    if BIASED:
        total += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[:, None]
    to = y + sample[None, :] * rows + row[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (sample[None, :] < batch))


@triton.jit
def _unpack(
    values, mask, scale, weight, rows, width, kept, words, blocks,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    start, end = row * kept, rows * kept
    for word in range(words):
        part, start = _word(values, mask, start, row, inside, word, words, end)
        if SCALED:
            part = part.to(tl.float32) * tl.load(scale + row * blocks + word // BLOCK, mask=inside, other=0)[:, None]
        at = word * 64 + tl.arange(0, 64)
        to = weight + row[:, None] * width + at[None, :]
        tl.store(to, part.to(weight.dtype.element_ty), mask=inside[:, None] & (at[None, :] < width))


@triton.jit
def _place(
    score, own, threshold, rival, cost, count, rows,
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
        owns = tl.load(own + at, mask=has_channel, other=0)[:, None, :]
        limits = tl.load(threshold + to, mask=has_group, other=0)[None, :, :]
        rivals = tl.load(rival + to, mask=has_group, other=0)[None, :, :]
        total += tl.sum(tl.where(scores > limits, rivals - owns, 0.0), axis=2)
    inside = (channel < count)[:, None] & (group < count)[None, :]
    tl.store(cost + channel[:, None] * count + group[None, :], total, mask=inside)


def multiply(
    x: Tensor, values: Tensor, mask: Tensor, scale: Tensor | None, bias: Tensor | None, *, width: int, block: int
) -> Tensor:
    """Return x W^T + bias, (batch, rows), for contiguous x (batch, width) and the tensors of a `PackedWeight`.

    batch is at most `LARGEST_BATCH`; `block` is the number of channels per scale. The result has the data type of x.
    """
    rows, kept = values.shape
    y = x.new_empty(len(x), rows)
    narrow = x.is_cuda and x.dtype == values.dtype != torch.float32  # the interpreter multiplies bf16 as integers
    _multiply[(triton.cdiv(rows, ROWS),)](
        x, values, mask, _or(scale, values), _or(bias, values), y, len(x), rows, width, kept, *_words(mask, scale),
        BLOCK=block // WORD, SCALED=scale is not None, BIASED=bias is not None, NARROW=narrow, BATCH=LARGEST_BATCH,
        ROWS=ROWS,
    )  # fmt: skip
    return y


def unpack(values: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, *, width: int, block: int) -> Tensor:
    """Return the dense weight (rows, width) of type `dtype` for the tensors of a `PackedWeight`."""
    rows, kept = values.shape
    weight = torch.empty(rows, width, dtype=dtype, device=values.device)
    _unpack[(triton.cdiv(rows, ROWS),)](
        values, mask, _or(scale, values), weight, rows, width, kept, *_words(mask, scale),
        BLOCK=block // WORD, SCALED=scale is not None, ROWS=ROWS,
    )  # fmt: skip
    return weight


def place(score: Tensor, own: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    """Return the sum over rows r of rival[g, r] - own[c, r] where score[c, r] > threshold[g, r], as a matrix (c, g).

    All four arguments are fp32 (k, rows), and the result is fp32 (k, k).
    """
    count, rows = score.shape
    cost = score.new_empty(count, count)
    parts = [part.contiguous() for part in (score, own, threshold, rival)]
    grid = (triton.cdiv(count, CHANNELS), triton.cdiv(count, GROUPS))
    _place[grid](*parts, cost, count, rows, CHANNELS=CHANNELS, GROUPS=GROUPS, LINES=LINES)
    return cost


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return the tensor, or if it is None `other` as a valid pointer, which the kernel does not read."""
    return other if tensor is None else tensor


def _words(mask: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """Return the number of words in a row of the mask, and the number of scales per row (0 without scales)."""
    return mask.shape[1] // 8, 0 if scale is None else scale.shape[1]
