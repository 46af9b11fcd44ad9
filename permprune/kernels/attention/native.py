"""Native attention of a few queries to packed keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.states import WIDEST, PackedStates, is_reachable
from permprune.kernels.library import NUMBERS
from permprune.kernels.product.layout import FLOATS

PART = 512
"""Number of tokens whose contributions are added up by one thread."""


@dataclass(frozen=True, eq=False)
class Side:
    """The keys, or the values, that queries read: `packed` ones, if there are, and `whole` ones.

    `whole` is (batch, heads, tokens, width), in the stored order of channels. `order`, int64 (heads, width), has the
    channel of queries or outputs for each stored one; None if it is the same.
    """

    packed: PackedStates | None
    whole: Tensor
    order: Tensor | None = None

    def fits(self, batch: int, heads: int, width: int, packed: int) -> bool:
        """Return whether this has these sizes, `width` channels, and at least `packed` packed tokens."""
        order, whole, states = self.order, self.whole, self.packed
        fits = whole.shape[:2] == (batch, heads) and whole.shape[3] == width <= WIDEST and whole.dtype in FLOATS
        fits &= order is None or (order.shape == (heads, width) and is_reachable(order))
        if states is None:
            return fits and packed == 0
        return fits and states.shape[:2] == (batch, heads) and states.width == width and states.shape[2] >= packed


def attend(
    query: Tensor,
    keys: Side,
    values: Side,
    *,
    packed: int,
    before: int,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Return the output of attention, (batch, count, heads, width of the values), in the type of the query.

    `query`, (batch, heads, count, width), reads `before` whole tokens, `packed` packed ones, and the other whole ones.
    `mask`, bool, is True where a query reads a token, and `added`, fp32, is added to the scores; both are (batch,
    heads, count, tokens), and may be expanded. Scores are soft-capped to -`softcap` .. `softcap`. `sinks`, fp32
    (heads,), are scores of tokens without values. Without a mask and with `causal`, a query reads the tokens up to its
    own. Sums and the softmax are in fp32; the result does not depend on the number of threads. Raises `PermpruneError`
    if the tensors do not match, heads have more than `WIDEST` channels, or a code does not keep its pattern.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, all_heads, count, width = query.shape
    heads, value_width = keys.whole.shape[1], values.whole.shape[3]
    length = keys.whole.shape[2] + packed
    fits = all_heads % heads == 0 and query.dtype in FLOATS and query.device.type == "cpu"
    fits &= keys.fits(batch, heads, width, packed) and values.fits(batch, heads, value_width, packed)
    if keys.packed and values.packed:  # and the same memory
        fits &= keys.packed.shape == values.packed.shape
    fits &= sinks is None or sinks.shape == (all_heads,)
    if not fits or values.whole.shape[2] != keys.whole.shape[2] or not 0 <= before <= length - packed:
        raise PermpruneError(f"queries of shape {tuple(query.shape)} and the keys and values they read do not match")
    parts = -(-length // PART)
    output = query.new_empty(batch, count, all_heads, value_width)
    read = (batch, all_heads, count, length)
    mask, added = _expanded(mask, torch.bool, read), _expanded(added, torch.float32, read)
    library.run(
        "attend",
        batch * all_heads * count * length * (width + value_width),
        packed=tuple(side.packed.struct if side.packed else {} for side in (keys, values)),
        whole=tuple(_whole_states(side) for side in (keys, values)),
        order=(keys.order, values.order),
        query=query,
        mask=mask,
        added=added,
        sinks=None if sinks is None else sinks.float().contiguous(),
        output=output,
        partial=query.new_empty(batch * parts * all_heads * count, value_width + 2, dtype=torch.float32),
        query_stride=query.stride()[:3],
        mask_stride=(0, 0, 0) if mask is None else mask.stride()[:3],
        added_stride=(0, 0, 0) if added is None else added.stride()[:3],
        batch=batch,
        heads=heads,
        group=all_heads // heads,
        count=count,
        before=before,
        packed_tokens=packed,
        length=length,
        parts=parts,
        scaling=scaling,
        softcap=softcap or 0.0,
        number=NUMBERS[query.dtype],
        causal=causal and count > 1,
    )
    return output


def attend_many(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return the output of attention on matrix units, (batch, count, heads of the queries, width), all in bf16.

    `query` is (batch, heads of the queries, count, width), `key` and `value` (batch, heads, length, width). `mask`,
    bool, is True where a query reads a token; it is expanded to (batch, heads of the queries, count, length). With
    `causal` query i reads the first i + 1 tokens. A query that reads none gets zeros. Raises `PermpruneError` if the
    tensors do not match, heads have more than `WIDEST` channels, or there are no matrix units.
    """
    batch, all_heads, count, width = query.shape
    heads, length = key.shape[1:3]
    fits = key.shape == value.shape == (batch, heads, length, width) and width <= WIDEST and all_heads % heads == 0
    fits &= all(states.dtype == torch.bfloat16 and states.is_cpu for states in (query, key, value))
    if not fits or scaling < 0:
        raise PermpruneError(f"queries of shape {tuple(query.shape)} and keys {tuple(key.shape)} do not match")
    query, key, value = (s if s.stride(-1) == 1 else s.contiguous() for s in (query, key, value))
    output = query.new_empty(batch, count, all_heads, width)
    mask = _expanded(mask, torch.bool, (batch, all_heads, count, length))
    library.run(
        "attend_many",
        2 * batch * all_heads * count * length * width,
        query=query,
        key=key,
        value=value,
        mask=mask,
        output=output,
        query_stride=query.stride()[:3],
        key_stride=key.stride()[:3],
        value_stride=value.stride()[:3],
        mask_stride=(0, 0, 0) if mask is None else mask.stride()[:3],
        batch=batch,
        heads=heads,
        group=all_heads // heads,
        count=count,
        length=length,
        width=width,
        scaling=scaling,
        causal=causal,
    )
    return output


def _whole_states(side: Side) -> dict[str, Any]:
    states = side.whole.contiguous()
    *tokens, width = states.shape
    number = NUMBERS[states.dtype]
    return {"width": width, "kept": width, "values": states, "tokens": math.prod(tokens), "number": number}


def _expanded(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """Return a mask whose last dimension is contiguous; strides are 0 where it is expanded."""
    if mask is None:
        return None
    if mask.dtype != dtype or mask.device.type != "cpu":
        raise PermpruneError(f"a mask of {mask.dtype} on {mask.device} does not fit native attention")
    expanded = mask.expand(shape)
    return expanded if expanded.stride(-1) == 1 else expanded.contiguous()
