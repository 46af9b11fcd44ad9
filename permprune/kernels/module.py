"""A linear layer whose weight is packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.linear import multiply_native, packed_linear
from permprune.kernels.packed import PackedWeight
from permprune.pattern import Pattern

PARTS = ("values", "mask", "scale", "bias", "order")
"""The names of a layer's tensors, in the order in which the kernels take them."""


class PackedLinear(nn.Module):
    """y = x W^T + bias with a packed weight; replaces an `nn.Linear`, or a `Conv1D` (`transposed`).

    The tensors are those of `PackedWeight`. If there is an `order`, int64 (width,), channel c of the weight reads
    channel `order[c]` of x. The layer is for inference and has no gradients. On devices other than the CPU, PyTorch
    unpacks the weight for each product.
    """

    scale: Tensor | None
    order: Tensor | None
    values: Tensor
    mask: Tensor

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, order: Tensor | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.pattern, self.block, self.transposed = weight.pattern, weight.block, transposed
        self.in_features, self.out_features = weight.width, weight.values.shape[0]
        for name, tensor in (
            ("values", weight.values),
            ("mask", weight.mask),
            ("scale", weight.scale),
            ("order", order),
        ):
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._described: tuple[tuple[int, ...], native.Weights] | None = None

    @classmethod
    def pack(
        cls, layer: nn.Module, pattern: Pattern, dtype: torch.dtype, block: int = 64, order: Tensor | None = None
    ) -> PackedLinear:
        """Pack the weight of an `nn.Linear` or `Conv1D`. Raises `PermpruneError` as `PackedWeight.pack` does."""
        transposed = isinstance(layer, Conv1D)
        stored: Tensor = layer.weight.data  # type: ignore[union-attr,assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        packed = PackedWeight.pack(stored.T if transposed else stored, pattern, dtype, block)
        return cls(packed, None if bias is None else bias.data, order, transposed)

    @classmethod
    def empty(
        cls, layer: nn.Module, pattern: Pattern, dtype: torch.dtype, block: int = 64, ordered: bool = False
    ) -> PackedLinear:
        """Create a layer with the shapes and types of `pack` on the meta device, to be filled from a checkpoint.

        `ordered` is whether it has a channel order.
        """
        transposed = isinstance(layer, Conv1D)
        stored: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        rows, width = reversed(stored.shape) if transposed else stored.shape
        pattern.require_divisible(width, "a packed layer")

        def meta(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        weight = PackedWeight(
            pattern,
            meta(rows, width // pattern.m * pattern.n, dtype=dtype),
            meta(rows, -(-width // native.WORD) * 8, dtype=torch.uint8),
            meta(rows, -(-width // block), dtype=torch.float32) if dtype == torch.int8 else None,
            block,
        )
        return cls(
            weight,
            None if bias is None else meta(rows, dtype=bias.dtype),
            meta(width, dtype=torch.int64) if ordered else None,
            transposed,
        )

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, which shares the layer's tensors."""
        return PackedWeight(self.pattern, self.values, self.mask, self.scale, self.block)

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, in stored order and in the shape of the replaced layer's weight; a new tensor."""
        dtype = self.values.dtype if self.values.is_floating_point() else torch.float32
        unpacked = self.packed.unpack(dtype)
        return unpacked.T if self.transposed else unpacked

    def dense(self, dtype: torch.dtype, natural: bool = True) -> nn.Module:
        """Return the dense layer that this one replaces, with its zeros, in type `dtype`.

        The weight's columns are in the order of the channels of x, or, unless `natural`, in stored order.
        """
        weight = self.packed.unpack(dtype)
        if natural and self.order is not None:
            weight = weight[:, self.order.argsort()]
        with torch.device("meta"):
            layer = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        layer.weight = nn.Parameter((weight.T if self.transposed else weight).contiguous())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data.to(dtype))
        return layer.train(self.training)

    def check(self, name: str) -> None:
        """Raise `PermpruneError` unless the tensors are valid (`PackedWeight.check`) and `order` is a permutation."""
        self.packed.check(name)
        if self.order is not None and not self.order.is_meta:
            every = torch.arange(self.in_features, device=self.order.device)
            if self.order.shape != every.shape or not torch.equal(self.order.sort().values, every):
                raise PermpruneError(f"{name} has a channel order that is not a permutation: pack the model again")

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.requires_grad or x.device.type != "cpu" or not native.available():
            n, m = self.pattern.n, self.pattern.m
            product: Tensor = packed_linear(
                x, self.values, self.mask, self.scale, self.bias, self.order, n, m, self.block
            )
            return product
        return multiply_native(self._describe(), x, self.values.dtype, self.order, self.bias)

    def _describe(self) -> native.Weights:
        """Return the description of the tensors for the kernels; it is cached until a tensor is replaced."""
        buffers = self._buffers
        tensors = [self.bias if part == "bias" else buffers[part] for part in PARTS]
        places = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        if self._described is None or self._described[0] != places:
            described = native.describe(*tensors, n=self.pattern.n, m=self.pattern.m, block=self.block)  # type: ignore[arg-type]
            self._described = places, described
        return self._described[1]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without pointers, because a copy has other tensors."""
        return {**self.__dict__, "_described": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.pattern}, {self.values.dtype}"
