"""Autocast to bfloat16: attention in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from permprune.system.device import autocast_dtype, compute_device, fast_dtype

QUERIES = 64
"""Queries of a block. Under a causal mask a block reads only the keys up to its last query."""
SCORES = 1 << 20
"""Attention scores that are computed at once: 2 MiB, which stay in the processor's cache."""


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype, *, blocks: bool = True) -> Iterator[None]:
    """A context in which activations on this device have this type; attention on a CPU runs in blocks with `blocks`."""
    attention = BlockwiseAttention() if blocks else nullcontext()
    casts = dtype != torch.float32
    with torch.autocast(device.type, dtype, enabled=casts), FillsInRange() if casts else nullcontext(), attention:
        yield


def fast(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which activations of a model have the fastest type of its device; attention is that of PyTorch."""
    device = compute_device(model)
    return autocast(device, fast_dtype(device), blocks=False)


class FillsInRange(TorchFunctionMode):
    """Keeps what `masked_fill` writes in the range of the tensor's type, and leaves infinities.

    DeBERTa fills scores, which autocast has made bfloat16, with the least number of fp32, which torch refuses.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill) and isinstance(args[-1], float):
            *others, value = args
            most = torch.finfo(others[0].dtype).max if others[0].is_floating_point() else math.inf
            args = (*others, value if math.isinf(value) else min(max(value, -most), most))
        return func(*args, **(kwargs or {}))


class BlockwiseAttention(TorchFunctionMode):
    """Computes `scaled_dot_product_attention` in bfloat16 on a CPU block by block; other calls run as they are.

    It is faster than torch's kernel, because bf16 matrix products do the work (`benchmarks/attention.py`). Scores are
    rounded to bfloat16, so that gradients of keys can be less exact than torch's. Masks are those of padding: the same
    for all heads. Calls with other masks or dropout, and causal calls with numbers of queries and keys that differ, go
    to torch.
    """

    @classmethod
    def is_active(cls) -> bool:
        """Whether the present code runs in such a context."""
        return any(isinstance(mode, cls) for mode in _get_current_function_mode_stack())

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _attend(*args, **kwargs) if func is F.scaled_dot_product_attention else None
        return func(*args, **kwargs) if result is None else result


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The attention's result (batch, heads, queries, channels of a value), bfloat16; None for calls of other kinds."""
    if dropout_p or query.device.type != "cpu" or query.dim() != 4:
        return None
    if attn_mask is not None:
        trains = torch.is_grad_enabled() and query.requires_grad  # torch's forward pass is as fast, its backward is not
        if is_causal or not trains or not _same_for_heads(attn_mask, len(query)):
            return None
    batch, heads, length, width = query.shape
    heads_match = heads == key.shape[1] or enable_gqa
    dtype = autocast_dtype(query.device) or query.dtype
    if dtype != torch.bfloat16 or not heads_match or (is_causal and length != key.shape[2]):
        return None
    scaled = query * (width**-0.5 if scale is None else scale)  # before rounding to bfloat16
    groups = (batch * key.shape[1], heads // key.shape[1], length, width)
    grouped = [scaled.reshape(groups), key.flatten(0, 1), value.flatten(0, 1)]
    mask = None if attn_mask is None else _added(attn_mask)
    result: Tensor = _Attention.apply(*(x.to(torch.bfloat16) for x in grouped), is_causal, mask)  # type: ignore[no-untyped-call]
    return result.view(batch, heads, length, -1)


def _same_for_heads(mask: Tensor, batch: int) -> bool:
    """Whether a mask is (batch, 1, queries or 1, keys), and no query reads nothing."""
    shaped = mask.dim() == 4 and mask.shape[:2] == (batch, 1) and not mask.requires_grad
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(torch.bfloat16).min / 2
    return shaped and bool(seen.any(-1).all())


def _added(mask: Tensor) -> Tensor:
    """What a mask adds to the scores, bfloat16 (batch, queries or 1, keys)."""
    if mask.dtype != torch.bool:
        return mask[:, 0].to(torch.bfloat16)
    return torch.zeros_like(mask[:, 0], dtype=torch.bfloat16).masked_fill_(~mask[:, 0], -torch.inf)


class _Attention(torch.autograd.Function):
    """Attention of query heads that share a key/value head; the backward pass computes the probabilities again.

    Queries are (n, g, length, channels) and scaled, keys and values (n, keys, channels), where n counts the key/value
    heads of the whole batch and g the query heads of each. A mask (batch, queries or 1, keys) is added to the scores.
    All are bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, mask: Tensor | None) -> Tensor:
        result = query.new_empty((*query.shape[:3], value.shape[-1]))
        for heads, queries, seen in _blocks(query, key, is_causal):
            added = _mask_of(mask, heads, queries, len(key))
            probabilities = _probabilities(query[heads, :, queries], key[heads, :seen], is_causal, added)
            block = result[heads, :, queries]
            block.copy_(torch.bmm(probabilities, value[heads, :seen]).view_as(block))
        ctx.save_for_backward(query, key, value)
        ctx.is_causal, ctx.mask = is_causal, mask
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        of_key, of_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))  # sums over the blocks
        for heads, queries, seen in _blocks(query, key, ctx.is_causal):
            keys, block = key[heads, :seen], query[heads, :, queries]
            added = _mask_of(ctx.mask, heads, queries, len(key))
            probabilities = _probabilities(block, keys, ctx.is_causal, added)
            of_output = gradient[heads, :, queries].flatten(1, 2)
            of_value[heads, :seen] += torch.bmm(probabilities.mT, of_output)
            of_probabilities = torch.bmm(of_output, value[heads, :seen].mT)
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            of_query[heads, :, queries] = torch.bmm(of_scores, keys).view_as(block)
            of_key[heads, :seen] += torch.bmm(of_scores.mT, block.flatten(1, 2))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice, int]]:
    """Iterate over (key/value heads, queries, number of keys that these queries read)."""
    heads, shared, length, _ = query.shape
    keys = key.shape[1]
    together = max(SCORES // (shared * min(QUERIES, length) * keys), 1)
    for head in range(0, heads, together):
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            yield slice(head, head + together), slice(start, stop), stop if is_causal else keys


def _mask_of(mask: Tensor | None, heads: slice, queries: slice, count: int) -> Tensor | None:
    """The mask of a block, (n, 1, queries or 1, keys), of `count` key/value heads of the whole batch."""
    if mask is None:
        return None
    example = torch.arange(count)[heads] // (count // len(mask))
    return (mask if mask.shape[1] == 1 else mask[:, queries])[example, None]


def _probabilities(query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None) -> Tensor:
    """The probabilities (n, g * queries, keys) of a block of queries (n, g, queries, channels), the last ones seen."""
    scores = torch.bmm(query.flatten(1, 2), key.mT).view(*query.shape[:3], -1)
    if mask is not None:
        scores += mask
    if is_causal:
        queries = query.shape[2]
        later = torch.full((queries, queries), -torch.inf, dtype=scores.dtype).triu(1)
        scores[..., -queries:] += later
    return scores.softmax(-1).flatten(1, 2)
