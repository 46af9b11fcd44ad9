"""Native attention of a few queries to packed keys and values.

Packed states are named parts, each (batch, heads, tokens, size of the part), as `permprune.kv.packing`
describes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.attention.codes import INT5, PLANES, code_bytes, kept_count
from permprune.kernels.product.layout import FLOATS
from permprune.pattern import Pattern

WIDEST = 256
"""The most channels of a head."""

PART = 512
"""Number of tokens whose contributions are added up by one thread."""

SCALED = (torch.int8, INT5)
"""The types of kept values that are integers, with a scale for each token and head."""

NUMBERS = {**native.NUMBERS, INT5: len(native.NUMBERS)}
"""The numbers of the types of kept values in the library."""

_EVERY, _BITS, _ONE_OF_4 = range(3)


class States(ctypes.Structure):
    """`struct states` of cache.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "code", "signs", "amplitude", "scale", "level")),
        *((name, ctypes.c_int64) for name in ("tokens", "width", "kept", "code_bytes", "sign_bytes")),
        *((name, ctypes.c_int32) for name in ("number", "kind")),
    )


class Attention(ctypes.Structure):
    """`struct attention` of cache.h."""

    _fields_ = (
        *((name, States * 2) for name in ("packed", "whole")),
        ("order", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("query", "mask", "added", "sinks", "output", "partial")),
        *((name, ctypes.c_int64 * 3) for name in ("query_stride", "mask_stride", "added_stride")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "group", "count")),
        *((name, ctypes.c_int64) for name in ("before", "packed_tokens", "length", "parts")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_int32) for name in ("number", "causal")),
        ("bad", ctypes.c_void_p),
    )


class Unpacking(ctypes.Structure):
    """`struct unpacking` of cache.h."""

    _fields_ = (
        ("states", States),
        ("output", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "first", "count")),
        ("number", ctypes.c_int32),
        ("bad", ctypes.c_void_p),
    )


class PackedStates:
    """Packed states of tokens as the library reads them, (batch, heads, tokens); they hold the tensors.

    `parts` are as in `permprune.kv.packing`, and `level` is fp32 (heads, width); without a `pattern` all
    channels are kept. Raises `PermpruneError` if the parts do not match, or are not contiguous or not on the CPU.
    """

    def __init__(self, parts: Mapping[str, Tensor], level: Tensor, pattern: Pattern | None) -> None:
        values, (heads, width) = parts["values"], level.shape
        kept = kept_count(pattern, width)
        sizes = part_sizes(values.dtype, width, pattern, recovers="amplitude" in parts)
        fits = parts.keys() == sizes.keys() and values.shape[1] == heads and width <= WIDEST
        for name, part in parts.items() if fits else ():
            size, dtype = sizes[name]
            fits &= part.shape == (*values.shape[:3], size) and part.dtype == dtype and _reachable(part)
        if not fits or level.dtype != torch.float32 or not _reachable(level):
            raise PermpruneError(
                f"packed states of {width} channels have parts that do not match or are not on the CPU"
            )
        self.parts, self.level, self.shape, self.width = dict(parts), level, tuple(values.shape[:3]), width
        self.struct = States(
            **{name: part.data_ptr() for name, part in parts.items()},
            level=level.data_ptr() if "amplitude" in parts else None,
            tokens=values.shape[:3].numel(),
            width=width,
            kept=kept,
            code_bytes=sizes["code"][0] if "code" in sizes else 0,
            sign_bytes=sizes["signs"][0] if "signs" in sizes else 0,
            number=NUMBERS[values.dtype],
            kind=kind_of(pattern),
        )

    def unpack(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `first` to `first` + `count`, with pruned channels zero or recovered.

        Returns (batch, heads, count, width) of fp32, bf16 or fp16, in the stored order. Raises `PermpruneError` for
        another type, tokens out of range, or a code that does not keep its pattern.
        """
        batch, heads, tokens = self.shape
        if dtype not in FLOATS or not 0 <= first <= first + count <= tokens:
            raise PermpruneError(f"{count} of {tokens} packed tokens from {first} on cannot be unpacked to {dtype}")
        output = torch.empty(batch, heads, count, self.width, dtype=dtype)
        numbers = {"batch": batch, "heads": heads, "first": first, "count": count, "number": native.NUMBERS[dtype]}
        native.run("unpack_states", Unpacking(self.struct, output.data_ptr(), **numbers), output.numel())
        return output


@dataclass(frozen=True, eq=False)
class Side:
    """The keys, or the values, that queries read: `packed` ones, if there are, and `whole` ones.

    `whole` is (batch, heads, tokens, width), in the stored order of channels. `order`, int64 (heads, width), has the
    channel of queries or outputs for each stored one.
    """

    packed: PackedStates | None
    whole: Tensor
    order: Tensor

    def fits(self, batch: int, heads: int, width: int, packed: int) -> bool:
        """Return whether this has these sizes, `width` channels, and at least `packed` packed tokens."""
        order, whole, own = self.order, self.whole, self.packed
        found = whole.shape[:2] == (batch, heads) and whole.shape[3] == width <= WIDEST and whole.dtype in FLOATS
        found &= order.shape == (heads, width) and order.dtype == torch.int64 and _reachable(order)
        if own is None:
            return found and packed == 0
        return found and own.shape[:2] == (batch, heads) and own.width == width and own.shape[2] >= packed


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries (batch, heads, count, width), and how they read tokens.

    `mask`, bool, is True where a query reads a token, and `added`, fp32, is added to the scores; both are (batch,
    heads, count, tokens), and may be expanded. Scores are soft-capped to -`softcap` .. `softcap`. `sinks`, fp32
    (heads,), are scores of tokens without values. Without a mask and with `causal`, a query reads the tokens up to its
    own.
    """

    query: Tensor
    scaling: float
    softcap: float | None = None
    mask: Tensor | None = None
    added: Tensor | None = None
    sinks: Tensor | None = None
    causal: bool = True


def attend(queries: Queries, keys: Side, values: Side, packed: int, before: int) -> Tensor:
    """Return the output of attention, (batch, count, heads, width of the values), in the type of the query.

    The queries read `before` whole tokens, `packed` packed ones, and the other whole ones. Sums and the softmax are in
    fp32; the result does not depend on the number of threads. Raises `PermpruneError` if the tensors do not match,
    heads have more than `WIDEST` channels, or a code does not keep its pattern.
    """
    query = queries.query if queries.query.stride(-1) == 1 else queries.query.contiguous()
    batch, all_heads, count, width = query.shape
    heads, value_width = keys.whole.shape[1], values.whole.shape[3]
    length = keys.whole.shape[2] + packed
    fits = all_heads % heads == 0 and query.dtype in FLOATS and query.device.type == "cpu"
    fits &= keys.fits(batch, heads, width, packed) and values.fits(batch, heads, value_width, packed)
    if not fits or values.whole.shape[2] != keys.whole.shape[2] or not 0 <= before <= length - packed:
        raise PermpruneError(f"queries of shape {tuple(query.shape)} and the keys and values they read do not match")
    sides = (keys, values)
    whole = [side.whole.contiguous() for side in sides]
    parts = -(-length // PART)
    output = query.new_empty(batch, count, all_heads, value_width)
    partial = torch.empty(batch * parts * all_heads * count, value_width + 2)
    (mask, mask_stride), (added, added_stride) = (
        _expanded(t, dtype, (batch, all_heads, count, length))
        for t, dtype in ((queries.mask, torch.bool), (queries.added, torch.float32))
    )
    sinks = None if queries.sinks is None else queries.sinks.float().contiguous()
    job = Attention(
        packed=(States * 2)(*(_no_states(side) if side.packed is None else side.packed.struct for side in sides)),
        whole=(States * 2)(*map(_states_of_whole, whole)),
        order=(ctypes.c_void_p * 2)(keys.order.data_ptr(), values.order.data_ptr()),
        query=query.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        added=None if added is None else added.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        output=output.data_ptr(),
        partial=partial.data_ptr(),
        query_stride=(ctypes.c_int64 * 3)(*query.stride()[:3]),
        mask_stride=mask_stride,
        added_stride=added_stride,
        batch=batch,
        heads=heads,
        group=all_heads // heads,
        count=count,
        before=before,
        packed_tokens=packed,
        length=length,
        parts=parts,
        scaling=queries.scaling,
        softcap=queries.softcap or 0.0,
        number=native.NUMBERS[query.dtype],
        causal=queries.causal and count > 1,
    )
    native.run("attend", job, batch * all_heads * count * length * (width + value_width))
    return output


def part_sizes(
    dtype: torch.dtype, width: int, pattern: Pattern | None, *, recovers: bool
) -> dict[str, tuple[int, torch.dtype]]:
    """Return the size and the type of each part of packed states; none for values of a type that is not stored.

    `recovers` is whether pruned channels are recovered by their signs.
    """
    if dtype not in (*SCALED, *FLOATS):
        return {}
    kept = kept_count(pattern, width)
    sizes = {"values": (-(-kept // 2) if dtype == INT5 else kept, dtype)}
    if dtype in SCALED:
        sizes["scale"] = (1, torch.bfloat16)
    if pattern is not None:
        sizes["code"] = (code_bytes(pattern, width), torch.uint8)
        if recovers:
            sizes["signs"] = (-(-(width - kept) // 8), torch.uint8)
            sizes["amplitude"] = (1, torch.uint8 if dtype in SCALED else dtype)
    if dtype == INT5:
        sizes["signs"] = (-(-width // 8), torch.uint8)
    return sizes


def kind_of(pattern: Pattern | None) -> int:
    """Return the number of a pattern's codes in `enum channels` of cache.h."""
    if pattern is None:
        return _EVERY
    return _ONE_OF_4 + pattern.n - 1 if pattern in PLANES else _BITS


def _no_states(side: Side) -> States:
    width = side.whole.shape[3]
    return States(width=width, kept=width)


def _states_of_whole(states: Tensor) -> States:
    width = states.shape[-1]
    tokens, number = states.shape[:3].numel(), native.NUMBERS[states.dtype]
    return States(values=states.data_ptr(), tokens=tokens, width=width, kept=width, number=number)


def _expanded(
    given: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Tensor | None, ctypes.Array[ctypes.c_int64]]:
    """Return a mask with the strides of its dimensions before the last, which are 0 where it is expanded."""
    if given is None:
        return None, (ctypes.c_int64 * 3)()
    if given.dtype != dtype or given.device.type != "cpu":
        raise PermpruneError(f"a mask of {given.dtype} on {given.device} does not fit native attention")
    expanded = given.expand(shape)
    if expanded.stride(-1) != 1:
        expanded = expanded.contiguous()
    return expanded, (ctypes.c_int64 * 3)(*expanded.stride()[:3])


def _reachable(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.device.type == "cpu"
