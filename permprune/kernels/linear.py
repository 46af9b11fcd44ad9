"""y = x W^T for packed weights, as an operator that `torch.compile` and `torch.export` know.

    y = torch.ops.permprune.packed_linear(x, values, mask, scale, bias, order, n, m, block)

Up to `LARGEST_BATCH` rows of activations are multiplied by the packed weight itself; more are multiplied by BLAS, with
a few rows of the weight unpacked at a time. Up to that batch, int8 weights multiply activations that are rounded to
int8, with a scale for every 64 channels of a row; beyond it, the activations as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.packed import PackedWeight
from permprune.pattern import Pattern

LARGEST_BATCH = 64
"""Rows of activations up to which the packed weight is read as it is."""
UNPACKED_ROWS = 256
"""Rows of the weight that are unpacked at a time for BLAS."""


@torch.library.custom_op("permprune::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    n: int,
    m: int,
    block: int,
) -> Tensor:
    """x W^T + bias for activations (..., width), of fp32, bf16 or fp16, and the tensors of a `PackedWeight`.

    `bias` is (rows,); `order`, int64 (width,), tells which channel of x each channel of the weight reads. The result is
    (..., rows) of the type of x. Raises `PermpruneError` when shapes, types or devices do not fit.
    """
    _require_activations(x, values, n, m)
    if native.available() and x.device.type == "cpu":
        weights = native.describe(values, mask, scale, bias, order, n=n, m=m, block=block)
        return multiply_native(weights, x, values.dtype, order, bias)
    native.require_layout(values, mask, scale, bias, order, n=n, m=m, block=block)
    return multiply_reference(PackedWeight(Pattern(n, m), values, mask, scale, block), x, bias, order)


@packed_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    n: int,
    m: int,
    block: int,
) -> Tensor:
    _require_activations(x, values, n, m)
    native.require_layout(values, mask, scale, bias, order, n=n, m=m, block=block)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def multiply_native(
    weights: native.Weights, x: Tensor, dtype: torch.dtype, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`packed_linear` on native kernels, for a weight of `dtype` described with this order and bias."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] <= LARGEST_BATCH:
        y = native.multiply(weights, rows)
    else:
        y = _multiply_unpacked(weights, rows, dtype, order, bias)
    return y.view(*x.shape[:-1], weights.rows)


def _multiply_unpacked(
    weights: native.Weights, x: Tensor, dtype: torch.dtype, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same for a large batch: BLAS, and the weight unpacked in tiles, to fp32 unless it is stored as x is."""
    exact = x.dtype if x.dtype == dtype else torch.float32
    channels = (x if order is None else _reorder(x, order)).to(exact)
    y = torch.empty(x.shape[0], weights.rows, dtype=exact)
    tile = torch.empty(min(UNPACKED_ROWS, weights.rows), weights.width, dtype=exact)
    for first in range(0, weights.rows, UNPACKED_ROWS):
        some = tile[: weights.rows - first]
        native.unpack(weights, first, some)
        y[:, first : first + UNPACKED_ROWS] = channels @ some.T
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def multiply_reference(weight: PackedWeight, x: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """`packed_linear` in plain PyTorch, on any device: slow, since it unpacks the weight every time."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if order is not None:
        rows = _reorder(rows, order)
    if weight.scale is not None and 0 < rows.shape[0] <= LARGEST_BATCH:
        rows = round_to_int8(rows)
    y = rows @ weight.unpack().T
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def round_to_int8(x: Tensor) -> Tensor:
    """fp32 (batch, width) as the kernels of int8 weights see it: 255 steps between the largest of 64 channels."""
    words = torch.nn.functional.pad(x, (0, -x.shape[1] % native.WORD)).unflatten(1, (-1, native.WORD))
    largest = words.abs().amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    inverse = torch.full_like(largest, 127) / largest  # "127 / largest" would be 127 times the rounded reciprocal
    steps = torch.where(largest > 1e-30, words * inverse, words * 0).round()
    return (steps * (largest / 127)).flatten(1)[:, : x.shape[1]]


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    if not ((order >= 0) & (order < x.shape[1])).all():
        raise PermpruneError(f"a channel order names channels outside 0 to {x.shape[1] - 1}: pack the model again")
    return x.index_select(1, order)


def _require_activations(x: Tensor, values: Tensor, n: int, m: int) -> None:
    width = values.shape[-1] // n * m
    if x.dtype not in native.FLOATS or x.dim() == 0 or x.shape[-1] != width:
        raise PermpruneError(
            f"activations of shape {tuple(x.shape)} and type {x.dtype} do not fit a packed weight of {width} channels: "
            f"give (..., {width}) of fp32, bf16 or fp16"
        )
