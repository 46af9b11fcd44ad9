"""Weights that keep everything, in int8: tables (rows, width) with a scale for every 64 channels of a row.

They are embeddings, heads and the layers that a mix left dense. In small models the embedding table is about a third of
all bytes, and the head reads all of it for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, LARGEST_BATCH, require_activations
from permprune.kernels.product.linear import bias_gradient, multiply_native, no_view, round_to_int8
from permprune.kernels.product.module import dense_layer
from permprune.kernels.product.packed import quantize

ROWS = 4096
"""Number of rows of a table that are converted to fp32 at a time."""


@torch.library.custom_op("permprune::int8_linear", mutates_args=())
def int8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (..., rows), for activations x (..., width) in fp32, bf16 or fp16 and an int8 table.

    `values` is int8 (rows, width) and `scale` fp32 (rows, width / 64). Few rows of activations are rounded to int8 as
    for packed weights, and many are multiplied by BLAS. The table is frozen: there are gradients for the activations,
    those of the product without rounding, and the bias. Raises `PermpruneError` if shapes or types do not match.
    """
    _require_fit(x, values, scale)
    if library.available() and x.device.type == "cpu":
        return no_view(multiply_native(native.describe_plain(values, scale, bias), x, torch.int8, None, bias))
    rows = x.reshape(-1, x.shape[-1])
    exact = round_to_int8(rows.float()) if len(rows) <= LARGEST_BATCH else rows
    if library.runs_triton(x.device.type):
        y = _multiply_gpu(exact.contiguous(), values, scale, bias)
    else:
        tiles = (dequantize(*tile) for tile in zip(values.split(ROWS), scale.split(ROWS), strict=True))
        y = torch.cat([exact.float() @ tile.T for tile in tiles], -1)
        y = y if bias is None else y + bias
    return no_view(y.to(x.dtype).view(*x.shape[:-1], len(values)))


def _multiply_gpu(rows: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product with Triton kernels; larger batches with BLAS."""
    from permprune.kernels.product import gpu  # needs Triton

    table = gpu.of_table(values, scale)
    if len(rows) <= gpu.LARGEST_BATCH:
        return gpu.multiply(rows, table, bias)
    return F.linear(rows, gpu.unpack(table, rows.dtype), None if bias is None else bias.to(rows.dtype))


@int8_linear.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _require_fit(x, values, scale)
    return x.new_empty(*x.shape[:-1], len(values))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, scale, bias = ctx.saved_tensors
    x = None
    if ctx.needs_input_grad[0]:
        tiles = zip(gradient.split(ROWS, -1), values.split(ROWS), scale.split(ROWS), strict=True)
        x = sum(rows.float() @ dequantize(integers, steps) for rows, integers, steps in tiles)
    return None if x is None else x.to(gradient.dtype), None, None, bias_gradient(ctx, gradient, bias, 3)


int8_linear.register_autograd(_backward, setup_context=_save)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 numbers (..., width) for int8 values (..., width) and scales (..., width / 64)."""
    numbers: Tensor = (values.unflatten(-1, (-1, BLOCK)).float() * scale[..., None]).flatten(-2)
    return numbers


class Int8Table(nn.Module):
    """The tensors of an int8 table: `values`, int8 (rows, width), and `scale`, fp32 (rows, width / 64)."""

    values: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @classmethod
    def pack(cls, weight: Tensor, **options: Any) -> Int8Table:
        """Create a table by rounding a weight (rows, width) to int8; on the meta device one to be filled later.

        `options` are passed to the constructor. Raises `PermpruneError` as `require`.
        """
        cls.require(weight)
        values, scale = quantize(weight.float().contiguous())
        return cls(values.to(torch.int8), scale, **options)

    @staticmethod
    def require(weight: Tensor) -> None:
        """Raise `PermpruneError` if 64 does not divide the width of a weight, or it is not finite."""
        if weight.shape[1] % BLOCK:
            raise PermpruneError(f"rows of {weight.shape[1]} channels cannot be int8: {BLOCK} does not divide them")
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise PermpruneError("a weight to be int8 is NaN or infinite: repair the checkpoint first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Table:
        """Move the tensors; the scales stay fp32 where other numbers are converted, as by `model.bfloat16()`."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    @property
    def weight(self) -> Tensor:
        """The table in fp32; a new tensor."""
        return dequantize(self.values, self.scale)

    def check(self, name: str) -> None:
        """Raise `PermpruneError` if the types or shapes of the tensors are wrong or a scale is not finite."""
        rows, width = self.values.shape
        fits = self.values.dtype == torch.int8 and self.scale.dtype == torch.float32
        fits &= self.scale.shape == (rows, width // BLOCK)
        if not fits or (not self.scale.is_meta and not torch.isfinite(self.scale).all()):
            raise PermpruneError(f"{name} is damaged: pack the model again")


class Int8Embedding(Int8Table):
    """An `nn.Embedding` in int8, whose outputs have data type `dtype`; `.to(dtype)` changes it."""

    def __init__(self, values: Tensor, scale: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__(values, scale)
        self.num_embeddings, self.embedding_dim = values.shape
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Embedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        super()._apply(fn, recurse)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (..., width) of the token ids (...)."""
        return dequantize(F.embedding(ids, self.values), F.embedding(ids, self.scale)).to(self.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Return an `nn.Embedding` with the numbers of the table in type `dtype`."""
        with torch.device("meta"):
            layer = nn.Embedding(self.num_embeddings, self.embedding_dim)
        layer.weight = nn.Parameter(self.weight.to(dtype))
        return layer


class Int8Linear(Int8Table):
    """An `nn.Linear`, or a `Conv1D` (`transposed`), with an int8 weight: a head, or a layer that was not pruned."""

    def __init__(self, values: Tensor, scale: Tensor, *, bias: Tensor | None = None, transposed: bool = False) -> None:
        super().__init__(values, scale)
        self.transposed = transposed
        self.out_features, self.in_features = values.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., rows) for activations x (..., width)."""
        product: Tensor = int8_linear(x, self.values, self.scale, self.bias)
        return product

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense layer with the numbers of the table, and the bias, in type `dtype`."""
        return dense_layer(self.weight.to(dtype), self.bias, transposed=self.transposed)


class TiedHead(nn.Module):
    """A head that shares the table of an embedding and has no tensors of its own."""

    def __init__(self, embedding: Int8Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is not registered as a submodule

    @property
    def embedding(self) -> Int8Embedding:
        """The embedding whose table the head shares."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., rows) for activations x (..., width)."""
        table = self.embedding
        product: Tensor = int8_linear(x, table.values, table.scale, None)
        return product


def _require_fit(x: Tensor, values: Tensor, scale: Tensor) -> None:
    rows, width = values.shape
    if scale.shape != (rows, width // BLOCK):
        raise PermpruneError(
            f"{rows} rows of {width} channels in int8 do not have scales of shape {tuple(scale.shape)}"
        )
    require_activations(x, width, values)
