"""Triton kernels: matrix products with packed weights for small batches, and unpacking.

Triton is part of PyTorch's builds for GPUs. On the CPU, tests run the kernels in Triton's interpreter
(`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from permprune.kernels.product.layout import BLOCK
from permprune.kernels.product.packed import PackedWeight
from permprune.system.device import INT4

LARGEST_BATCH = 16
"""The maximum rows of activations in one product, which is the smallest tile of a GPU's matrix units."""

ROWS = 32
"""Rows of a weight that one Triton program multiplies or unpacks."""

MASKS, POSITIONS, PLAIN = (tl.constexpr(kind) for kind in range(3))
"""How the channels of values are known: by masks, by positions in fours, or as those of an int8 table, all of them."""


class Stored(NamedTuple):
    """A weight as the kernels read it.

    `tensors` are codes, values (those of int4 in pairs) and scales. `sizes` are its rows, width, blocks of a row, bytes
    of a row, bytes of a block, and values of a block. Kernels are compiled for the `kinds`: `SIZE` is the bytes of a
    value, 0 if two share one, and `SCALE` those of a scale, 0 without.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    sizes: tuple[int, ...]
    kinds: dict[str, int]


@triton.jit
def _block(
    codes, values, scales, row, inside, n, row_bytes, block_bytes, slots,
    HEADER: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Return the 64 channels of block `n` of some rows, including zeros, and its scales (1 without, and of int4).

    No value outside a block is read, even if its code is damaged.
    """
    channel = tl.arange(0, 64)
    start = row * row_bytes + n * block_bytes
    if KIND == PLAIN:
        weight = tl.load(values + start[:, None] + channel[None, :], mask=inside[:, None], other=0)
        scale = tl.load(scales + row * (row_bytes // 64) + n, mask=inside, other=0)
    else:
        byte = tl.load(codes + start[:, None] + channel[None, :] // 8, mask=inside[:, None], other=0).to(tl.int32)
        if KIND == POSITIONS:
            pair = byte >> (channel // 4 % 2 * 4)[None, :]
            place, first, second = (channel % 4)[None, :], pair & 3, (pair >> 2) & 3
            bit = ((place == first) | (place == second)).to(tl.int32)
            rank = (channel // 4 * 2)[None, :] + (place == second).to(tl.int32)
        else:
            bit = (byte >> (channel % 8)[None, :]) & 1
            rank = tl.cumsum(bit, axis=1) - bit
        shown = inside[:, None] & (bit == 1) & (rank < slots)
        scale = tl.full((1,), 1.0, tl.float32)
        if SIZE == 0:  # int4: two values in a byte
            stored = tl.load(values + (start + HEADER)[:, None] + rank // 2, mask=shown, other=0).to(tl.int32)
            integer = ((stored >> (rank % 2 * 4)) & 15) - 8
            if KIND == POSITIONS:
                integer = 2 * integer + (first > second).to(tl.int32)
            own = tl.load(scales + (start + 8) // SCALE, mask=inside, other=0).to(tl.int32)[:, None]
            level = (own >> (channel // 16 * 3)[None, :]) & 7
            step = ((((own >> 12) & 15) + 114) << 23 | level << 20).to(tl.float32, bitcast=True)
            weight = tl.where(shown, integer, 0).to(tl.float32) * step
        else:
            weight = tl.load(values + ((start + HEADER) // SIZE)[:, None] + rank, mask=shown, other=0)
            if SCALE > 0:
                scale = tl.load(scales + (start + 8) // SCALE, mask=inside, other=0).to(tl.float32)
    return weight, scale


@triton.jit
def _multiply(
    x, codes, values, scales, bias, y, batch, rows, width, count, row_bytes, block_bytes, slots,
    HEADER: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, BIASED: tl.constexpr,
    NARROW: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    channel, sample = tl.arange(0, 64), tl.arange(0, BATCH)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for n in range(count):
        weight, scale = _block(
            codes, values, scales, row, inside, n, row_bytes, block_bytes, slots, HEADER, SIZE, KIND, SCALE
        )
        at = n * 64 + channel
        shown = (at[:, None] < width) & (sample[None, :] < batch)
        read = tl.load(x + sample[None, :] * width + at[:, None], mask=shown, other=0)
        if NARROW:  # both are bf16 or fp16, which matrix units support
            part = tl.dot(weight, read)
        else:
            part = tl.dot(weight.to(tl.float32), read.to(tl.float32), input_precision="ieee")
        total += part * scale[:, None]
    if BIASED:
        total += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[:, None]
    to = y + sample[None, :] * rows + row[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (sample[None, :] < batch))


@triton.jit
def _unpack(
    codes, values, scales, weight, rows, width, count, row_bytes, block_bytes, slots,
    HEADER: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    for n in range(count):
        part, scale = _block(
            codes, values, scales, row, inside, n, row_bytes, block_bytes, slots, HEADER, SIZE, KIND, SCALE
        )
        if SCALE > 0:
            part = part.to(tl.float32) * scale[:, None]
        at = n * 64 + tl.arange(0, 64)
        to = weight + row[:, None] * width + at[None, :]
        tl.store(to, part.to(weight.dtype.element_ty), mask=inside[:, None] & (at[None, :] < width))


def of_packed(weight: PackedWeight) -> Stored:
    """Describe a contiguous packed weight: the same bytes are codes, values and scales."""
    blocks, layout, in_pairs = weight.blocks, weight.layout, weight.layout.dtype == INT4
    tensors = blocks, blocks.view(torch.uint8 if in_pairs else layout.dtype), blocks.view(layout.scale or torch.uint8)
    sizes = (len(blocks), layout.width, layout.count, layout.row_bytes, layout.block_bytes, layout.slots)
    kinds = {
        "HEADER": layout.header,
        "SIZE": 0 if in_pairs else layout.dtype.itemsize,
        "KIND": (POSITIONS if layout.positions else MASKS).value,
        "SCALE": layout.scale.itemsize if layout.scale else 0,
    }
    return Stored(tensors, sizes, kinds)


def of_table(values: Tensor, scale: Tensor) -> Stored:
    """Describe a contiguous int8 table, `values` (rows, width) with a `scale`, fp32 (rows, width / 64)."""
    (rows, width), count = values.shape, scale.shape[1]
    kinds = {"HEADER": 0, "SIZE": 1, "KIND": PLAIN.value, "SCALE": scale.itemsize}
    return Stored((values, values, scale), (rows, width, count, width, BLOCK, BLOCK), kinds)


def multiply(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (batch, rows), for contiguous x (batch, width), in the data type of x.

    batch is at most `LARGEST_BATCH`.
    """
    y = x.new_empty(len(x), weight.sizes[0])
    codes, values, _ = weight.tensors
    narrow = x.is_cuda and x.dtype == values.dtype != torch.float32  # the interpreter multiplies bf16 as integers
    _multiply[(triton.cdiv(y.shape[1], ROWS),)](
        x, *weight.tensors, codes if bias is None else bias, y, len(x), *weight.sizes,
        **weight.kinds, BIASED=bias is not None, NARROW=narrow, BATCH=LARGEST_BATCH, ROWS=ROWS,
    )  # fmt: skip
    return y


def unpack(weight: Stored, dtype: torch.dtype) -> Tensor:
    """Return the dense weight (rows, width) of type `dtype`."""
    dense = torch.empty(weight.sizes[:2], dtype=dtype, device=weight.tensors[0].device)
    _unpack[(triton.cdiv(len(dense), ROWS),)](*weight.tensors, dense, *weight.sizes, **weight.kinds, ROWS=ROWS)
    return dense
