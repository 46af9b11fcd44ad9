"""Products with weights and masks as the search tries them, in passes without gradients.

Dense products multiply a masked weight's zeros, too. The kernel for many rows of activations leaves them out, whichever
weights of a row a mask keeps; packing the weight for it takes no longer than writing its zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, CODE
from permprune.kernels.search.masks import apply_mask, require_layout
from permprune.pattern import Pattern

LEAST_ROWS = 128
"""Rows of activations from which the product is faster than a dense one, with the time that packing takes."""


class MaskedWeight(Tensor):
    """A weight (rows, width) with zeros where a mask has none, whose linear layer may leave out what is pruned.

    `bits` are those of `pack_mask`. Every function but `torch.nn.functional.linear` is given the weight with its zeros.
    """

    _weight: Tensor
    _bits: Tensor

    @staticmethod
    def fits(weight: Tensor, pattern: Pattern) -> bool:
        """Whether the kernels multiply a weight of this type and place, and leaving out what is pruned pays."""
        plain = weight.dtype == torch.float32 and weight.is_cpu and weight.stride(-1) == 1
        return plain and pattern.n * BLOCK <= pattern.m * native.MOST_SLOTS and library.available()

    @classmethod
    def of(cls, weight: Tensor, bits: Tensor) -> MaskedWeight:
        """Return a masked weight, which copies neither of the two; the weight is one that `fits`."""
        made = Tensor._make_subclass(cls, weight)
        made._weight, made._bits = weight, bits
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not kwargs and isinstance(args[1], cls):
                product = _multiply(args[0], args[1], args[2] if len(args) > 2 else None)
                if product is not None:
                    return product
            given = tuple(one._with_zeros() if isinstance(one, cls) else one for one in args)
            return func(*given, **{name: _plain(one) for name, one in (kwargs or {}).items()})

    def _with_zeros(self) -> Tensor:
        return apply_mask(self._weight, self._bits, torch.float32)


def _plain(value: Any) -> Any:
    return value._with_zeros() if isinstance(value, MaskedWeight) else value


def _multiply(x: Tensor, masked: MaskedWeight, bias: Tensor | None) -> Tensor | None:
    """The product with activations (..., width), or None where a dense one is faster."""
    weight, bits = masked._weight, masked._bits
    rows, width = weight.shape
    tokens = x.reshape(-1, x.shape[-1])
    fits = x.dtype == torch.float32 and x.is_cpu and x.shape[-1] == width and library.available()
    if not fits or len(tokens) < LEAST_ROWS:
        return None
    count = -(-width // BLOCK)
    blocks = native.workspace(rows * count * (CODE + 4 * BLOCK), of="blocks")
    weights = native.describe_blocks(blocks, bias, rows=rows, width=width)
    if not native.is_fastest(weights, tokens):
        return None
    require_layout("a mask", bits, torch.uint8, rows, -(-width // 8))
    members = {"weight": weight, "bits": bits.contiguous(), "blocks": blocks, "row_stride": weight.stride(0)}
    library.run("compress", weight.numel(), rows=rows, width=width, **members)
    return native.multiply(weights, tokens.contiguous(), many=True).view(*x.shape[:-1], rows)
