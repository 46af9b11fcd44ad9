"""Checked calls of the native functions for packed weights."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product.layout import BLOCK, FLOATS, LARGEST_BATCH, Layout
from permprune.system.device import INT4, processor_has

Weights = Any
"""A `weights` structure of the library: pointers, which are valid while the tensors stay in place."""

NUMBERS = {**library.NUMBERS, INT4: len(library.NUMBERS)}
"""The numbers of data types in the library."""

MOST_SLOTS = 40
"""Most kept weights of a block with which leaving out the others is faster than a dense product (5:8 of them)."""

MOST_SLOTS_BESIDE_PAIRS = 16
"""The same where dense products multiply pairs of bf16, and the kernel that leaves out the others does not (1:4)."""

MASKS_FROM, MASKS_TO = 32, 96
"""Rows of activations in bf16 from which kernels for few rows are slower, beside products of pairs, for weights with
masks, and up to which leaving out is faster than these, if integers have to be unpacked for them."""

MANY = {"avx2": (16, 32)} | dict.fromkeys(("avx512", "amx"), (LARGEST_BATCH + 1, LARGEST_BATCH + 1))
"""Rows of activations from which the kernel for many rows is faster than the others (docs/results/speed.md), with
weights in floating point and with integers, by the name of the kernels; portable ones are slower than dense products,
and those of ARM were not measured."""

PAIRS_FROM = 16
"""Rows of activations from which the kernel for many rows of pairs of bf16 is faster than the others."""

TILES_FROM, SPLIT_FROM = 8, 32
"""The same of tiles of bf16 (AMX), for any pattern; the second, if weights are split into parts of bf16 for them."""

_kept = threading.local()
"""The memory of each thread (see `workspace`)."""

_MASK, _POSITIONS, _PLAIN = range(3)
_OF_PAIRS = {NUMBERS[torch.bfloat16], NUMBERS[torch.int8], NUMBERS[INT4]}
"""The values that the kernel for pairs of bf16 multiplies."""
_SPLIT = {NUMBERS[torch.float32], NUMBERS[torch.float16]}
"""The values that matrix units multiply in parts of bf16."""


def describe(layout: Layout, blocks: Tensor, bias: Tensor | None = None, order: Tensor | None = None) -> Weights:
    """Return the tensors of a packed weight as the library reads them.

    Raises `PermpruneError` if the tensors do not match (`Layout.require`), or if one is not contiguous or not on the
    CPU.
    """
    layout.require(blocks, bias, order)
    for tensor in (blocks, bias, order):
        if tensor is not None and not (tensor.is_contiguous() and tensor.device.type == "cpu"):
            raise PermpruneError("a packed weight has to be contiguous and on the CPU for native kernels")
    n, m = layout.pattern.n, layout.pattern.m
    return _structure(
        blocks,
        bias,
        layout.dtype,
        kind=_POSITIONS if layout.positions else _MASK,
        order=order,
        width=layout.width,
        slots=layout.slots,
        half=2 * n == m and BLOCK // 2 % m == 0,
    )


def state_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return all that `describe` reads of a tensor: while it is the same, so is the description."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cpu


def describe_plain(values: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Weights:
    """Describe a weight that keeps everything, values (rows, width), as int8 tables and dense layers do.

    `scale` is fp32 (rows, width / 64), for int8 only. Raises `PermpruneError` unless the width is a multiple of 64 and
    the tensors, with a `bias` (rows,), are contiguous and match.
    """
    rows, width = values.shape
    tensors = [values] if scale is None else [values, scale]
    if width % BLOCK or not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
        raise PermpruneError(f"a plain weight has to be contiguous, on the CPU, and of a width that {BLOCK} divides")
    if (scale is None) == (values.dtype == torch.int8) or values.dtype not in NUMBERS:
        raise PermpruneError(f"a plain weight of {values.dtype} needs {'a scale' if scale is None else 'no scale'}")
    if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (rows, width // BLOCK)):
        raise PermpruneError(f"a plain weight has a scale of shape {tuple(scale.shape)} and type {scale.dtype}")
    _require_bias(bias, rows)
    return _structure(values, bias, values.dtype, kind=_PLAIN, scale=scale, width=width, slots=BLOCK)


def describe_blocks(
    blocks: Tensor, bias: Tensor | None, order: Tensor | None = None, *, rows: int, width: int
) -> Weights:
    """Describe the blocks that `struct compress` of the library writes, as (rows, width).

    They are fp32 and keep any weights, or, with an order, bf16 of 2:4.

    Raises `PermpruneError` for a bias that is not (rows,), contiguous and on the CPU.
    """
    _require_bias(bias, rows)
    if order is None:
        return _structure(blocks, bias, torch.float32, kind=_MASK, rows=rows, width=width, slots=BLOCK)
    kept = {"kind": _POSITIONS, "order": order, "slots": BLOCK // 2, "half": True}
    return _structure(blocks, bias, torch.bfloat16, rows=rows, width=width, **kept)


def _structure(blocks: Tensor, bias: Tensor | None, dtype: torch.dtype, *, width: int, **members: Any) -> Weights:
    """Return the structure of a weight whose values have a type; it has the rows of `blocks` unless `members` say."""
    described = {
        "blocks": blocks,
        "bias": bias,
        "rows": blocks.shape[0],
        "width": width,
        "count": -(-width // BLOCK),
        "number": NUMBERS[dtype],
        "bias_number": 0 if bias is None else NUMBERS[bias.dtype],
    }
    return library.structure("weights", **(described | members))


def _require_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and not (
        bias.shape == (rows,) and bias.is_contiguous() and bias.is_cpu and bias.dtype in FLOATS
    ):
        raise PermpruneError(f"a bias of shape {tuple(bias.shape)} and type {bias.dtype} does not fit {rows} rows")


def multiply(weights: Weights, x: Tensor, kernels: str | None = None, *, many: bool = False) -> Tensor:
    """Return x W^T + bias for contiguous x (batch, width) of fp32, bf16 or fp16, in the type of x: (batch, rows).

    `kernels` is one of `library.names()`, by default the best. With `many` the kernel for many rows of activations is
    used, which does not multiply what is pruned, and sums in fp32. Raises `PermpruneError` for other input.
    """
    functions, index = library.require(kernels)
    # The weights that the last product read have displaced torch from the processor's cache: each call of it here takes
    # about 10 us, ten times as long as in a loop of its own.
    shape = x.shape
    if x.dtype not in FLOATS or len(shape) != 2 or shape[1] != weights.width:
        raise PermpruneError(
            f"activations of shape {tuple(shape)} and type {x.dtype} do not fit a packed weight of "
            f"{weights.width} channels: give (batch, {weights.width}) of fp32, bf16 or fp16"
        )
    if not (x.is_contiguous() and x.is_cpu):
        raise PermpruneError("activations have to be contiguous and on the CPU for native kernels")
    batch = shape[0]
    output = x.new_empty(batch, weights.rows)
    if not output.numel():
        return output
    threads = library.threads(batch * weights.rows * weights.count * weights.slots)
    given = ctypes.byref(weights), x.data_ptr(), NUMBERS[x.dtype], batch, output.data_ptr()
    if many:
        memory = workspace(functions.permprune_many_bytes(given[0], *given[2:4], index, threads))
        status = functions.permprune_multiply_many(*given, memory.data_ptr(), memory.nbytes, index, threads)
    else:
        status = functions.permprune_multiply(*given, index, threads)
    if status == 3:
        raise PermpruneError(f"a channel order names channels outside 0 to {weights.width - 1}: pack the model again")
    library.require_done(status, f"a product of {batch} rows with a packed weight")
    return output


def is_many(weights: Weights, x: Tensor) -> bool:
    """Whether `multiply` with `many` is the fastest product of x (batch, width) with a packed weight here."""
    return (weights.slots <= MOST_SLOTS or multiplies_tiles(weights, x)) and is_fastest(weights, x)


def is_fastest(weights: Weights, x: Tensor) -> bool:
    """Whether `multiply` with `many` is the fastest product with a weight that keeps at most `MOST_SLOTS` of a block.

    It is from `MANY` rows on, or `PAIRS_FROM`, except where both are multiplied as bf16 (`multiplies_bf16`) and the
    kernel does not, or both are fp16 and the processor multiplies these. Activations in fp32 are rounded to bf16 by the
    kernel for pairs, if the weights are integers of 2:4. With matrix units (`multiplies_tiles`) it is from `TILES_FROM`
    rows on, or `SPLIT_FROM`, whatever a weight keeps.
    """
    kernels, rows = library.best(), x.shape[0]
    if kernels.name not in MANY:
        return False
    integers = weights.number >= NUMBERS[torch.int8]
    if multiplies_tiles(weights, x):
        if weights.number in _SPLIT:
            return rows >= SPLIT_FROM
        return rows >= (PAIRS_FROM + 1 if integers and x.dtype == torch.float32 else TILES_FROM)
    if multiplies_bf16(weights, x):
        if processor_has("amx_bf16"):
            return False
        if weights.kind == _POSITIONS:
            return rows >= PAIRS_FROM
        if weights.slots <= MOST_SLOTS_BESIDE_PAIRS:
            return rows >= MASKS_FROM
        return MASKS_FROM <= rows < MASKS_TO and integers
    if x.dtype == torch.float16 and weights.number == NUMBERS[x.dtype] and processor_has("avx512_fp16"):
        return False
    if integers and x.dtype == torch.float32 and kernels.pairs and weights.kind == _POSITIONS:
        return rows > PAIRS_FROM
    return rows >= MANY[kernels.name][integers]


def multiplies_bf16(weights: Weights, x: Tensor) -> bool:
    """Whether activations are bf16, the processor multiplies pairs of these, and bf16 can hold the weight's values."""
    return x.dtype == torch.bfloat16 and library.best().pairs and weights.number in _OF_PAIRS


def multiplies_tiles(weights: Weights, x: Tensor) -> bool:
    """Whether `multiply` with `many` uses matrix units: for floats, and for bf16 and fp32 beside integers.

    Floats in fp32 and fp16 are split into parts of bf16, whose products are added: errors are those of fp32. Beside
    integers, activations and the weight's values are rounded to bf16.
    """
    integers = weights.number >= NUMBERS[torch.int8]
    fits = x.dtype in (torch.float32, torch.bfloat16) if integers else weights.kind != _PLAIN
    return library.best().name == "amx" and fits


def is_few(weights: Weights, x: Tensor) -> bool:
    """Whether kernels for few rows are the fastest product that reads what is pruned."""
    longer = multiplies_bf16(weights, x) or multiplies_tiles(weights, x)
    return x.shape[0] < (MASKS_FROM if longer else LARGEST_BATCH + 1)


def most_plain(dtype: torch.dtype) -> int:
    """Return the rows of activations up to which a dense weight of the type is multiplied faster here than by PyTorch.

    PyTorch's products use matrix units in bf16, and multiply fp16 where the processor does.
    """
    if dtype == torch.bfloat16 and library.best().name == "amx":
        return TILES_FROM - 1
    if dtype == torch.float16 and processor_has("avx512_fp16"):
        return PAIRS_FROM
    return LARGEST_BATCH


def workspace(size: int, of: str = "lines") -> Tensor:
    """Return `size` bytes of memory that this thread's next call with the same `of` gets again, aligned to 64 bytes.

    With memory from the system in every call, its new pages take a seventh of the time of a dense product in fp32.
    """
    kept: Tensor | None = getattr(_kept, of, None)
    if kept is None or kept.nbytes < size:
        kept = aligned(size)
        setattr(_kept, of, kept)
    return kept[:size]


def aligned(size: int) -> Tensor:
    """Return `size` new bytes, aligned to 64."""
    memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % 64 :][:size]


def unpack(weights: Weights, first: int, output: Tensor, kernels: str | None = None) -> None:
    """Write rows of the weight with its zeros, from `first` on, to `output`.

    `output` is a contiguous (rows, width) of fp32, bf16 or fp16. Raises `PermpruneError` if it does not fit.
    """
    functions, index = library.require(kernels)
    rows, width = output.shape
    fits = output.dtype in FLOATS and output.is_contiguous() and output.device.type == "cpu"
    if not fits or width != weights.width or not 0 <= first <= weights.rows - rows:
        raise PermpruneError(f"{rows} rows of a packed weight from {first} on cannot be unpacked to {output.dtype}")
    written = output.data_ptr(), NUMBERS[output.dtype]
    threads = library.threads(output.numel())
    status = functions.permprune_unpack(ctypes.byref(weights), first, first + rows, *written, index, threads)
    library.require_done(status, "unpacking a weight")
