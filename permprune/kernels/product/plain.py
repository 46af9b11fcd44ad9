"""Linear layers that keep all weights, on the kernels of packed weights.

In a packed model the layers that were not pruned, the head first of all, take a large part of the time of a token. With
few rows of activations the kernels of packed weights multiply them as fast as memory allows, in bf16 several times as
fast as PyTorch's (`benchmarks/inference.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, FLOATS


@torch.library.custom_op("permprune::plain_linear", mutates_args=())
def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (..., rows), for x (..., width), and weight (rows, width) and bias (rows,) of its type.

    Up to `native.most_plain` rows of activations are multiplied by native kernels, if there are any for the type and
    width.
    Raises `PermpruneError` if shapes or types do not match.
    """
    _require_fit(x, weight, bias)
    return _multiply(x, weight, bias)


@plain_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _require_fit(x, weight, bias)
    return x.new_empty(*x.shape[:-1], len(weight))


class PlainLinear(nn.Linear):
    """An `nn.Linear` for inference that multiplies few rows of activations with native kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., out_features) for activations (..., in_features)."""
        trains = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        mixed = x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type)
        if trains or mixed or x.device != self.weight.device:
            return F.linear(x, self.weight, self.bias)  # with gradients, in another type, or with PyTorch's own message
        if library.is_traced():
            product: Tensor = plain_linear(x, self.weight, self.bias)
            return product
        return _multiply(x, self.weight, self.bias)


def use_kernels(model: nn.Module) -> None:
    """Make every `nn.Linear` of a model a `PlainLinear`, in place; its parameters, hooks and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PlainLinear


def use_pytorch(model: nn.Module) -> None:
    """Undo `use_kernels`."""
    for module in model.modules():
        if isinstance(module, PlainLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    plain = weight.dtype in FLOATS and weight.shape[1] % BLOCK == 0 and weight.is_contiguous()
    if not (plain and len(rows) and weight.device.type == "cpu" and library.available()):
        return F.linear(x, weight, bias)
    if len(rows) > native.most_plain(weight.dtype):
        return F.linear(x, weight, bias)
    y = native.multiply(native.describe_plain(weight), rows.contiguous())
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def _require_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not fits or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype)):
        raise PermpruneError(
            f"activations of shape {tuple(x.shape)} and type {x.dtype} do not fit a weight of shape "
            f"{tuple(weight.shape)} and type {weight.dtype}"
        )
