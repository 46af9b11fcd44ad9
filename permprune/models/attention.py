"""Attention in bfloat16 on a CPU, in blocks that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from permprune.system.device import autocast_dtype

QUERIES = 64
"""Queries of a block. Under a causal mask a block reads only the keys up to its last query."""
SCORES = 1 << 20
"""Attention scores that are computed at once: 2 MiB, which stay in the processor's cache."""


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype, *, blocks: bool = True) -> Iterator[None]:
    """A context in which activations on this device have this type; attention on a CPU runs in blocks with `blocks`."""
    attention = BlockwiseAttention() if blocks else nullcontext()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), attention:
        yield


class BlockwiseAttention(TorchFunctionMode):
    """Computes `scaled_dot_product_attention` in bfloat16 on a CPU block by block; other calls run as they are.

    Both passes take 0.6 to 0.8 of the time of torch's own kernel, because bf16 matrix products do the work
    (`benchmarks/attention.py`). Scores are rounded to bfloat16: gradients of keys can be less exact than torch's. Calls
    with an arbitrary mask or dropout, and causal calls with numbers of queries and keys that differ, go to torch.
    """

    @classmethod
    def is_active(cls) -> bool:
        """Whether the present code runs in such a context."""
        return any(isinstance(mode, cls) for mode in _get_current_function_mode_stack())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _runs_in_blocks(*args, **kwargs):
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _runs_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    if attn_mask is not None or dropout_p or query.device.type != "cpu" or query.dim() != 4:
        return False
    dtype = autocast_dtype(query.device) or query.dtype
    heads_match = query.shape[1] == key.shape[1] or enable_gqa
    return dtype == torch.bfloat16 and heads_match and (not is_causal or query.shape[2] == key.shape[2])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention's result (batch, heads, queries, channels of a value), bfloat16."""
    batch, heads, length, width = query.shape
    scaled = query * (width**-0.5 if scale is None else scale)  # before rounding to bfloat16
    groups = (batch * key.shape[1], heads // key.shape[1], length, width)
    grouped = [scaled.reshape(groups), key.flatten(0, 1), value.flatten(0, 1)]
    result: Tensor = _Attention.apply(*(x.to(torch.bfloat16) for x in grouped), is_causal)  # type: ignore[no-untyped-call]
    return result.view(batch, heads, length, -1)


class _Attention(torch.autograd.Function):
    """Attention of query heads that share a key/value head; the backward pass computes the probabilities again.

    Queries are (n, g, length, channels) and scaled, keys and values (n, keys, channels), where n counts the key/value
    heads of the whole batch and g the query heads of each. All are bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        result = query.new_empty((*query.shape[:3], value.shape[-1]))
        for at, part, seen in _blocks(query, key, is_causal):
            probabilities = _probabilities(query[at, :, part], key[at, :seen], is_causal)
            result[at, :, part] = torch.bmm(probabilities, value[at, :seen]).view_as(result[at, :, part])
        ctx.save_for_backward(query, key, value)
        ctx.is_causal = is_causal
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        of_key, of_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))  # sums over the blocks
        for at, part, seen in _blocks(query, key, ctx.is_causal):
            keys, own = key[at, :seen], query[at, :, part]
            probabilities = _probabilities(own, keys, ctx.is_causal)
            arriving = gradient[at, :, part].flatten(1, 2)
            of_value[at, :seen] += torch.bmm(probabilities.mT, arriving)
            of_probabilities = torch.bmm(arriving, value[at, :seen].mT)
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            of_query[at, :, part] = torch.bmm(of_scores, keys).view_as(own)
            of_key[at, :seen] += torch.bmm(of_scores.mT, own.flatten(1, 2))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice, int]]:
    """Iterate over (key/value heads, queries, number of keys that these queries read)."""
    heads, shared, length, _ = query.shape
    keys = key.shape[1]
    together = max(SCORES // (shared * min(QUERIES, length) * keys), 1)
    for head in range(0, heads, together):
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            yield slice(head, head + together), slice(start, stop), stop if is_causal else keys


def _probabilities(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """The probabilities (n, g * queries, keys) of a block of queries (n, g, queries, channels), the last ones seen."""
    scores = torch.bmm(query.flatten(1, 2), key.mT).view(*query.shape[:3], -1)
    if is_causal:
        queries = query.shape[2]
        later = torch.full((queries, queries), -torch.inf, dtype=scores.dtype).triu(1)
        scores[..., -queries:] += later
    return scores.softmax(-1).flatten(1, 2)
