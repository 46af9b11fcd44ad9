"""y = x W^T for packed weights, as an operator that `torch.compile` and `torch.export` support.

    y = torch.ops.permprune.packed_linear(x, values, mask, scale, bias, order, n, m, block)

Up to `LARGEST_BATCH` rows of activations are multiplied by the packed weight directly. For larger batches the weight is
unpacked a few rows at a time and multiplied with BLAS. In small batches the activations for int8 weights are rounded to
int8, with a scale for every 64 channels of a row; in large batches they are not rounded.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.packed import PackedWeight
from permprune.pattern import Pattern

LARGEST_BATCH = 64
"""Largest number of rows of activations that are multiplied by the packed weight directly."""
UNPACKED_ROWS = 256
"""Number of rows of the weight that are unpacked at a time for BLAS."""


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
    """Return x W^T + bias for activations (..., width), of fp32, bf16 or fp16, and the tensors of a `PackedWeight`.

    `bias` is (rows,); `order`, int64 (width,), is the channel of x that each channel of the weight reads. The result is
    (..., rows) in the type of x. Raises `PermpruneError` if shapes, types or devices do not match.
    """
    _require_activations(x, values, n, m)
    if native.available() and x.device.type == "cpu":
        weights = native.describe(values, mask, scale, bias, order, n=n, m=m, block=block)
        return multiply_native(weights, x, values.dtype, order, bias)
    native.require_layout(values, mask, scale, bias, order, n=n, m=m, block=block)
    weight = PackedWeight(Pattern(n, m), values, mask, scale, block)
    multiply = multiply_gpu if x.is_cuda and has_triton() else multiply_reference
    return multiply(weight, x, bias, order)


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
    """`packed_linear` with native kernels; `weights` describes a weight of type `dtype` with this order and bias."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] <= LARGEST_BATCH:
        y = native.multiply(weights, rows)
    else:
        y = _multiply_unpacked(weights, rows, dtype, order, bias)
    return y.view(*x.shape[:-1], weights.rows)


def _multiply_unpacked(
    weights: native.Weights, x: Tensor, dtype: torch.dtype, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`packed_linear` for a large batch, with BLAS and a weight that is unpacked in tiles.

    Products are computed in fp32, unless the weight is stored in the type of x.
    """
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


@cache
def has_triton() -> bool:
    """Whether Triton is installed; if not, a warning the first time."""
    if find_spec("triton"):
        return True
    warnings.warn("Triton is not installed: packed weights are multiplied by PyTorch, slowly", stacklevel=4)
    return False


def multiply_gpu(weight: PackedWeight, x: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """`packed_linear` with Triton kernels.

    Small batches read the packed weight; larger ones unpack it and multiply with BLAS, in fp32 only if the weight is
    stored in fp32.
    """
    from permprune.kernels import gpu  # needs Triton

    rows = x.reshape(-1, x.shape[-1])
    if order is not None:
        rows = rows.index_select(1, order)
    if weight.scale is not None and len(rows) <= LARGEST_BATCH:
        rows = round_to_int8(rows.float())
    parts = (weight.values, weight.mask, weight.scale)
    if len(rows) <= gpu.LARGEST_BATCH:
        y = gpu.multiply(rows.contiguous(), *parts, bias, width=weight.width, block=weight.block)
    else:
        exact = torch.float32 if weight.values.dtype == torch.float32 else rows.dtype
        dense = gpu.unpack(*parts, exact, width=weight.width, block=weight.block)
        y = rows.to(exact) @ dense.T
        y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def multiply_reference(weight: PackedWeight, x: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """`packed_linear` in plain PyTorch, on any device; it is slow, because it unpacks the weight in every call."""
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
    """Round fp32 (batch, width) as the kernels of int8 weights do.

    Each run of 64 channels is rounded to 255 steps from minus its largest magnitude to its largest magnitude.
    """
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
