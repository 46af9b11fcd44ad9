"""A linear layer whose weight is packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import _pytree
from transformers.pytorch_utils import Conv1D

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.linear import multiply_native, packed_linear
from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern


class UnpackedWeight(Tensor):
    """A weight that is unpacked wherever its numbers are used, but not to tell its type, shape or device."""

    unpack: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, unpack: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> UnpackedWeight:
        weight: UnpackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        weight.unpack = unpack
        return weight

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = _pytree.tree_map_only(cls, lambda weight: weight.unpack(), (args, kwargs or {}))
        return function(*args, **kwargs)


class PackedLinear(nn.Module):
    """y = x W^T + bias with a packed weight; replaces an `nn.Linear`, or a `Conv1D` (`transposed`) (see `replaces`).

    `blocks` are those of a `PackedWeight`. If there is an `order`, int64 (width,), channel c of the weight reads
    channel `order[c]` of x. The weight is frozen; there are gradients for x and, if it requires them, the bias.
    """

    blocks: Tensor
    order: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, order: Tensor | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.layout, self.transposed = weight.layout, transposed
        self.in_features, self.out_features = weight.layout.width, weight.blocks.shape[0]
        self.register_buffer("blocks", weight.blocks)
        self.register_buffer("order", order)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._described: tuple[tuple[Any, ...], native.Weights] | None = None

    @staticmethod
    @torch.no_grad()
    def replaces(layer: nn.Module) -> bool:
        """Whether a layer is one that a `PackedLinear` can replace: it computes what `nn.Linear` or `Conv1D` does.

        A subclass is tried: for random activations of several magnitudes it has to compute the same, apart from
        rounding. Layers whose weight another module reads (`NonDynamicallyQuantizableLinear`) are not replaced.
        """
        if type(layer) in (nn.Linear, Conv1D) or not isinstance(layer, (nn.Linear, Conv1D)):
            return isinstance(layer, (nn.Linear, Conv1D))
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            return False
        exact = copy.deepcopy(layer).float().eval()
        weight = exact.weight.data.T if isinstance(exact, Conv1D) else exact.weight.data
        drawn: Any = {"dtype": torch.float32, "device": "cpu"}
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0), **drawn)
        x = (x * torch.logspace(-3, 5, 5, **drawn)[:, None]).to(weight.device)
        expected, forward = F.linear(x, weight, exact.bias), cast(Any, type(exact)).forward  # without hooks
        try:
            result = forward(exact, x)
        except (RuntimeError, TypeError, ValueError):  # it reads something else
            return False
        if not isinstance(result, Tensor) or result.shape != expected.shape:
            return False
        return bool(((result - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all())

    @classmethod
    def pack(
        cls,
        layer: nn.Module,
        pattern: Pattern,
        dtype: torch.dtype,
        order: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> PackedLinear:
        """Pack the weight of an `nn.Linear` or `Conv1D`. Arguments and errors are those of `PackedWeight.pack`."""
        transposed = isinstance(layer, Conv1D)
        stored: Tensor = layer.weight.data  # type: ignore[union-attr,assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        packed = PackedWeight.pack(stored.T if transposed else stored, pattern, dtype, scale)
        return cls(packed, None if bias is None else bias.data, order, transposed)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, which shares the layer's blocks."""
        return PackedWeight(self.layout, self.blocks)

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, in stored order and in the shape of the replaced layer's weight.

        It is unpacked each time its numbers are used: many a model asks for its type alone, at every token.
        """
        dtype = self.layout.dtype if self.layout.dtype.is_floating_point else torch.float32

        def unpack() -> Tensor:
            unpacked = self.packed.unpack(dtype)
            return unpacked.T if self.transposed else unpacked

        if torch.compiler.is_compiling():
            return unpack()
        shape = torch.Size((self.out_features, self.in_features)[:: -1 if self.transposed else 1])
        return UnpackedWeight(unpack, shape, dtype, self.blocks.device)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense layer that this one replaces, with its zeros, in type `dtype`; columns in stored order."""
        return dense_layer(self.packed.unpack(dtype), self.bias, transposed=self.transposed).train(self.training)

    def check(self, name: str) -> None:
        """Raise `PermpruneError` unless the tensors are valid (`PackedWeight.check`) and `order` is a permutation."""
        self.packed.check(name)
        if self.order is not None and not self.order.is_meta:
            every = torch.arange(self.in_features, device=self.order.device)
            if self.order.shape != every.shape or not torch.equal(self.order.sort().values, every):
                raise PermpruneError(f"{name} has a channel order that is not a permutation: pack the model again")

    def forward(self, x: Tensor) -> Tensor:
        blocks, bias, order = tensors = self._buffers["blocks"], self._parameters["bias"], self._buffers["order"]
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if trains or library.is_traced() or not x.is_cpu or not library.available():
            width, pattern, dtype = self.in_features, self.layout.pattern, self.layout.dtype
            product: Tensor = packed_linear(x, blocks, bias, order, width, pattern.n, pattern.m, dtype)
            return product
        state = self.layout, *map(native.state_of, tensors)
        if self._described is None or self._described[0] != state:
            self._described = state, native.describe(self.layout, *tensors)  # type: ignore[arg-type]
        return multiply_native(self._described[1], x, self.layout.dtype, order, bias)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without pointers, which cannot be pickled."""
        return {**self.__dict__, "_described": None}

    def extra_repr(self) -> str:
        layout = self.layout
        return f"in_features={layout.width}, out_features={self.out_features}, {layout.pattern}, {layout.dtype}"


def dense_layer(weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> nn.Linear | Conv1D:
    """Return an `nn.Linear`, or a `Conv1D`, with a weight (rows, width) and a bias of its type."""
    rows, width = weight.shape
    with torch.device("meta"):
        layer = Conv1D(rows, width) if transposed else nn.Linear(width, rows, bias=bias is not None)
    layer.weight = nn.Parameter((weight.T if transposed else weight).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.data.to(weight.dtype))
    return layer
