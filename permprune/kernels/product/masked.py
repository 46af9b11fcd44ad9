"""Products with weights and masks as the search tries them, in passes without gradients.

Dense products multiply a masked weight's zeros, too. The kernels for many rows of activations leave them out; packing
the weight for them takes about as long as writing its zeros. In fp32 the mask may keep any weights of a row. In bf16 it
keeps two of each four columns in a given order, and the processor has instructions for pairs of bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.kernels import library
from permprune.kernels.product import native
from permprune.kernels.product.layout import BLOCK, CODE
from permprune.kernels.search.masks import apply_mask, require_layout
from permprune.pattern import Pattern
from permprune.system.device import processor_has

LEAST_ROWS = 128
"""Rows of activations from which the product is faster than a dense one, with the time that packing takes."""


ROOM = 2**28
"""The most bytes of `PackedWeights`."""


@dataclass
class KeptBlocks:
    """Memory for a packed weight, and whether it is `packed` there."""

    memory: Tensor
    packed: bool = False


class PackedWeights:
    """Packed weights by name, which products read again, up to `ROOM` bytes; further ones are packed for each product.

    The weights and their masks must not change.
    """

    def __init__(self) -> None:
        self._kept: dict[str, KeptBlocks] = {}
        self._room = ROOM

    def lend(self, name: str, weight: MaskedWeight) -> None:
        """Let the products of the weight of this name read what the first one packs."""
        if name not in self._kept and weight.packed_bytes <= self._room:
            self._kept[name] = KeptBlocks(native.aligned(weight.packed_bytes))
            self._room -= weight.packed_bytes
        weight._kept = self._kept.get(name)


class MaskedWeight(Tensor):
    """A weight (rows, width) with zeros where a mask has none, whose linear layer may leave out what is pruned.

    `bits` are those of `pack_mask`, and `columns`, int64 (width,), the columns in the order in which groups of the
    pattern follow each other, for products in bf16; None for products in fp32. Every function but
    `torch.nn.functional.linear` is given the weight with its zeros.
    """

    _weight: Tensor
    _bits: Tensor
    _columns: Tensor | None
    _kept: KeptBlocks | None

    @staticmethod
    def fits(weight: Tensor, pattern: Pattern, dtype: torch.dtype) -> bool:
        """Whether the kernels multiply such a weight in `dtype`, and leaving out what is pruned pays."""
        if not (weight.is_cpu and weight.stride(-1) == 1 and library.available()):
            return False
        if dtype == torch.bfloat16:  # with matrix units to bring activations into the order takes longer than they gain
            multiplied = library.best().pairs and not processor_has("amx_bf16")
            return multiplied and pattern == Pattern(2, 4) and weight.dtype in (torch.float32, torch.bfloat16)
        return dtype == weight.dtype == torch.float32 and pattern.n * BLOCK <= pattern.m * native.MOST_SLOTS

    @classmethod
    def of(cls, weight: Tensor, bits: Tensor, columns: Tensor | None = None) -> MaskedWeight:
        """Return a masked weight, which copies nothing; the weight is one that `fits`."""
        made = Tensor._make_subclass(cls, weight)
        made._weight, made._bits, made._columns, made._kept = weight, bits, columns, None
        return made

    @property
    def packed_bytes(self) -> int:
        """The bytes of the packed weight."""
        rows, width = self._weight.shape
        slots, number = (BLOCK, 4) if self._columns is None else (BLOCK // 2, 2)
        return rows * -(-width // BLOCK) * (CODE + number * slots)

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
            named = (kwargs or {}).items()
            return func(*given, **{name: one._with_zeros() if isinstance(one, cls) else one for name, one in named})

    def _with_zeros(self) -> Tensor:
        return apply_mask(self._weight, self._bits, torch.float32 if self._columns is None else torch.bfloat16)


def _multiply(x: Tensor, masked: MaskedWeight, bias: Tensor | None) -> Tensor | None:
    """The product with activations (..., width), or None where a dense one is faster."""
    weight, columns = masked._weight, masked._columns
    rows, width = weight.shape
    dtype = torch.float32 if columns is None else torch.bfloat16
    fits = (x.dtype == dtype or columns is not None) and x.is_cpu and x.shape[-1] == width and library.available()
    if not fits or x.numel() < LEAST_ROWS * width:
        return None
    tokens = x.reshape(-1, width).to(dtype).contiguous()
    kept = masked._kept
    blocks = kept.memory if kept else native.workspace(masked.packed_bytes, of="blocks")
    weights = native.describe_blocks(blocks, bias, columns, rows=rows, width=width)
    if not native.is_fastest(weights, tokens):
        return None
    if kept is None or not kept.packed:
        _pack(masked, blocks)
    if kept:
        kept.packed = True
    return native.multiply(weights, tokens, many=True).view(*x.shape[:-1], rows)


def _pack(masked: MaskedWeight, blocks: Tensor) -> None:
    """Write what the mask keeps to `blocks`."""
    weight, columns = masked._weight, masked._columns
    rows, width = weight.shape
    require_layout("a mask", masked._bits, torch.uint8, rows, -(-width // 8))
    if columns is not None:
        require_layout("an order of columns", columns, torch.int64, width)
    library.run(
        "compress",
        weight.numel(),
        weight=weight,
        bits=masked._bits.contiguous(),
        order=columns,
        blocks=blocks,
        rows=rows,
        width=width,
        row_stride=weight.stride(0),
        number=library.NUMBERS[weight.dtype],
    )
