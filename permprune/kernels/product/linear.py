"""y = x W^T for packed weights, as an operator that `torch.compile` and `torch.export` support.

    y = torch.ops.permprune.packed_linear(x, blocks, bias, order, width, n, m, dtype)

Few rows of activations are multiplied by kernels that read the packed weight as fast as memory allows. For many rows,
where multiplications are the limit, a kernel leaves out what is pruned, or unpacks it for matrix units
(`native.is_many`); where dense products are faster than that, the weight is unpacked a few rows at a time and
multiplied with BLAS (unless `native.is_few`). The kernels for few rows round the activations for int8 and int4 weights
to int8, with a scale for every 64 channels of a row; those for many may round them to bf16 (`native.is_fastest`). Rows
of activations that are not finite give what the dense product with zeros gives, whatever multiplies them.

The weight is frozen: there are gradients for the activations, those of the product without rounding, and the bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, LARGEST_BATCH, Layout, require_activations
from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern

UNPACKED_BYTES = 1 << 24
"""Bytes of the weight that are unpacked at a time for BLAS: with fewer, BLAS reads the activations too often."""


@torch.library.custom_op("permprune::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    width: int,
    n: int,
    m: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return x W^T + bias for activations (..., width), of fp32, bf16 or fp16, and the blocks of a `PackedWeight`.

    The weight is n:m with values stored as `dtype`. `bias` is (rows,); `order`, int64 (width,), is the channel of x
    that each channel of the weight reads. The result is (..., rows) in the type of x. Raises `PermpruneError` if
    shapes, types or devices do not match.
    """
    layout = Layout(Pattern(n, m), dtype, width)
    layout.require(blocks, bias, order)
    require_activations(x, width, blocks)
    if library.available() and x.device.type == "cpu":
        y = multiply_native(native.describe(layout, blocks, bias, order), x, dtype, order, bias)
    else:
        multiply = multiply_gpu if library.runs_triton(x.device.type) else multiply_reference
        y = multiply(PackedWeight(layout, blocks), x, bias, order)
    return no_view(y)


def no_view(y: Tensor) -> Tensor:
    """Return a result as no view: models such as Falcon add to it in place, which autograd refuses for views."""
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return result


@packed_linear.register_fake
def _(x: Tensor, blocks: Tensor, bias: Tensor | None, order: Tensor | None, width: int, *stored: Any) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        raise PermpruneError("packed layers have no ONNX form: export the model after permprune.unpack(model)")
    n, m, dtype = stored
    Layout(Pattern(n, m), dtype, width).require(blocks, bias, order)
    require_activations(x, width, blocks)
    return x.new_empty(*x.shape[:-1], blocks.shape[0])


@torch.library.custom_op("permprune::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    gradient: Tensor, blocks: Tensor, order: Tensor | None, width: int, n: int, m: int, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the activations, (..., width), for that of the outputs of `packed_linear`, (..., rows).

    Sums are in fp32.
    """
    weight, rows = PackedWeight(Layout(Pattern(n, m), dtype, width), blocks), gradient.reshape(-1, len(blocks))
    total = rows.new_zeros(len(rows), width, dtype=torch.float32)
    if library.available() and blocks.device.type == "cpu":
        tiles = _tiles(native.describe(weight.layout, blocks), torch.float32)
    else:
        tiles = iter([(slice(None), _unpack(weight, torch.float32))])
    for part, tile in tiles:
        total.addmm_(rows[:, part].float(), tile)
    if order is not None:
        total = torch.zeros_like(total).index_add_(1, order, total)
    return total.to(gradient.dtype).view(*gradient.shape[:-1], width)


@packed_linear_backward.register_fake
def _(gradient: Tensor, blocks: Tensor, order: Tensor | None, width: int, *_: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, blocks, bias, order, *ctx.layout = inputs
    ctx.save_for_backward(blocks, bias, order)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    blocks, bias, order = ctx.saved_tensors
    x = packed_linear_backward(gradient, blocks, order, *ctx.layout) if ctx.needs_input_grad[0] else None
    return x, None, bias_gradient(ctx, gradient, bias), *[None] * 5


packed_linear.register_autograd(_backward, setup_context=_save)


def bias_gradient(ctx: Any, gradient: Tensor, bias: Tensor | None, place: int = 2) -> Tensor | None:
    """Return the gradient of a bias, (rows,), for that of the outputs; None if argument `place` does not need it."""
    if bias is None or not ctx.needs_input_grad[place]:
        return None
    return gradient.reshape(-1, len(bias)).sum(0, dtype=torch.float32).to(bias.dtype)


def multiply_native(
    weights: native.Weights, x: Tensor, dtype: torch.dtype, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`packed_linear` with native kernels; `weights` describes a weight of type `dtype` with this order and bias."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if native.is_many(weights, rows):
        y = native.multiply(weights, rows, many=True)
    elif native.is_few(weights, rows):
        y = native.multiply(weights, rows)
    else:
        y = _multiply_unpacked(weights, rows, dtype, order, bias)
    return y.view(*x.shape[:-1], weights.rows)


def _multiply_unpacked(
    weights: native.Weights, x: Tensor, dtype: torch.dtype, order: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`packed_linear` for a large batch, with BLAS and a weight that is unpacked in tiles.

    Products are computed in fp32, unless the weight is stored in the type of x, or both are multiplied as bf16.
    """
    exact = x.dtype if x.dtype == dtype or native.multiplies_bf16(weights, x) else torch.float32
    channels = (x if order is None else _reorder(x, order)).to(exact)
    y = x.new_empty(x.shape[0], weights.rows, dtype=exact)
    for part, tile in _tiles(weights, exact):
        torch.mm(channels, tile.T, out=y[:, part])
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def _tiles(weights: native.Weights, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight with its zeros, some at a time, which are valid until the next ones."""
    rows = max(1, UNPACKED_BYTES // (weights.width * dtype.itemsize))
    most = min(rows, weights.rows)
    memory = native.workspace(most * weights.width * dtype.itemsize).view(dtype).view(most, weights.width)
    for first in range(0, weights.rows, rows):
        tile = memory[: weights.rows - first]
        native.unpack(weights, first, tile)
        yield slice(first, first + rows), tile


def multiply_gpu(weight: PackedWeight, x: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """`packed_linear` with Triton kernels.

    Small batches read the packed weight; larger ones unpack it and multiply with BLAS, in fp32 only if the weight is
    stored in fp32.
    """
    from permprune.kernels.product import gpu  # needs Triton

    rows = x.reshape(-1, x.shape[-1])
    if order is not None:
        rows = rows.index_select(1, order)
    if weight.layout.scale is not None and len(rows) <= LARGEST_BATCH:
        rows = round_to_int8(rows.float())
    if len(rows) <= gpu.LARGEST_BATCH:
        y = gpu.multiply(rows.contiguous(), gpu.of_packed(weight), bias)
    else:
        exact = torch.float32 if weight.layout.dtype == torch.float32 else rows.dtype
        y = rows.to(exact) @ _unpack(weight, exact).T
        y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def multiply_reference(weight: PackedWeight, x: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """`packed_linear` in plain PyTorch, on any device; it is slow, because it unpacks the weight in every call."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if order is not None:
        rows = _reorder(rows, order)
    if weight.layout.scale is not None and 0 < rows.shape[0] <= LARGEST_BATCH:
        rows = round_to_int8(rows)
    y = rows @ weight.unpack().T
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight with its zeros: on a GPU with Triton, else in plain PyTorch."""
    if library.runs_triton(weight.blocks.device.type):
        from permprune.kernels.product import gpu

        return gpu.unpack(gpu.of_packed(weight), dtype)
    return weight.unpack(dtype)


def round_to_int8(x: Tensor) -> Tensor:
    """Round fp32 (batch, width) as the kernels of integer weights do.

    Each run of 64 channels is rounded to 255 steps from minus its largest magnitude to its largest magnitude; runs with
    NaN or infinity stay as they are.
    """
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # "127 / largest" would be 127 times the rounded reciprocal
    steps = torch.where(largest > 1e-30, blocks * inverse, 0).round()
    rounded = torch.where(largest.isfinite(), steps * (largest / 127), blocks)
    return rounded.flatten(1)[:, : x.shape[1]]


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    if not ((order >= 0) & (order < x.shape[1])).all():
        raise PermpruneError(f"a channel order names channels outside 0 to {x.shape[1] - 1}: pack the model again")
    return x.index_select(1, order)
