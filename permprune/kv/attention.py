"""Attention on states that a cache layer holds in a form of its own, block by block with an online softmax.

`ATTENTION` is the name of an attention implementation of Transformers. With ordinary tensors it computes what "sdpa"
does, and soft-capped scores and learned sinks too. A cache layer that returns `States` from `update` computes the
attention itself.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from permprune.errors import PermpruneError
from permprune.models import sdpa

ATTENTION = "permprune"

QUERIES = 512
"""Number of queries of a head whose scores are computed at a time."""

SCORES, STATES = 2**22, 2**20
"""Limits of the numbers of scores, and of elements of unpacked states, that are held at a time."""

SAME = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest differences of a model's outputs, beside the largest output, that rounding explains, by its type."""

LEAST_BLOCK = 64
"""The least number of tokens of a block."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of an attention function.

    `query` is (batch, heads, queries, width). `mask` is bool, True where a query reads a token, or floating, to be
    added to the scores: (batch, heads or 1, queries, tokens). `bias`, added to the scores, has that shape too. Scores
    are soft-capped to -`softcap` .. `softcap`. `sinks`, (heads,), are the scores of tokens without values. Without a
    mask and with `causal`, a query reads the tokens up to its own.
    """

    query: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    causal: bool = True
    dropout: float = 0.0

    @property
    def ignores_constants(self) -> bool:
        """Whether a number that is added to all scores of a query changes nothing."""
        return self.softcap is None and self.sinks is None

    def at(self, places: Tensor) -> Call:
        """Return the call for tokens in another order, which stood at `places` before: int64 (batch, tokens)."""
        mask, bias = (None if t is None else _reordered(t, places) for t in (self.mask, self.bias))
        return dataclasses.replace(self, mask=mask, bias=bias)

    def of_heads(self, heads: Tensor) -> Call:
        """Return the call for some of the heads, int64 (heads,)."""
        mask, bias = (t if t is None or t.shape[1] == 1 else t[:, heads] for t in (self.mask, self.bias))
        sinks = None if self.sinks is None else self.sinks[heads]
        return dataclasses.replace(self, query=self.query[:, heads], mask=mask, bias=bias, sinks=sinks)

    def padding(self, count: int) -> Tensor:
        """Return how many of the first `count` tokens come before those that the newest query reads: int64 (batch,)."""
        assert self.mask is not None
        mask = self.mask[:, :, -1, :count]
        read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return (read.any(1).cumsum(-1) == 0).sum(-1).expand(len(self.query))

    def rows(self, start: int, stop: int) -> Call:
        """Return the call for queries `start` to `stop`."""
        mask, bias = (None if t is None else t[:, :, start:stop] for t in (self.mask, self.bias))
        return dataclasses.replace(self, query=self.query[:, :, start:stop], mask=mask, bias=bias)


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of the tokens from position `start` on, (batch, key/value heads, tokens, width).

    `visible`, bool (queries, tokens), is which of them each query reads; None for all.
    """

    start: int
    keys: Tensor
    values: Tensor
    visible: Tensor | None = None


class Source(ABC):
    """The tokens that queries attend to, the newest of which are the queries themselves."""

    length: int
    """Number of tokens."""

    heads: int
    """Number of key/value heads."""

    @abstractmethod
    def segments(self, first: int, count: int, size: int) -> Iterator[Segment]:
        """Yield all tokens in segments of at most `size`, for `count` queries at positions from `first` on."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise PermpruneError(
        "the model reads the cache by itself, not through Transformers' attention interface: it cannot run with a "
        "pruned cache, or the cache was made for another model or before set_attn_implementation: make a new one"
    )


class States(ABC):
    """What `update` of a cache layer returns in place of the keys and of the values.

    Whatever a model does with it but ask for its `shape`, that of the keys, raises `PermpruneError`.
    """

    shape: torch.Size

    @abstractmethod
    def attend(self, call: Call, module: nn.Module) -> Tensor:
        """Return the output of attention, (batch, queries, heads, width of the values)."""

    __torch_function__ = classmethod(_refuse)
    __getitem__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python looks for, such as to copy
            raise AttributeError(name)
        _refuse()


class StatesLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer for any number of tokens, whose `update` returns `States`.

    `change_batch(change)` replaces every tensor by `change(tensor)`, which selects or repeats rows of the batch.
    """

    change_batch: Callable[[Callable[[Tensor], Tensor]], None]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.change_batch(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the batch."""
        self.change_batch(lambda part: part[indices.to(part.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, as beam search does."""
        self.batch_select_indices(beam_idx)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | States,
    value: Tensor | States,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function for Transformers' `AttentionInterface`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(query, attention_mask, scaling, softcap, position_bias, s_aux, causal, dropout)
    if isinstance(key, States):
        return key.attend(call, module), None
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    return attend_plain(call, module, key, value), None


def _reordered(added: Tensor, places: Tensor) -> Tensor:
    """Return a mask or a bias, (batch or 1, heads, queries, tokens), for tokens in the order `places`."""
    added = added.expand(len(places), *added.shape[1:])
    return added.gather(-1, places[:, None, None].expand(*added.shape[:-1], -1))


def attend_plain(call: Call, module: nn.Module, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention to keys and values, (batch, key/value heads, tokens, width), in the layout of `States`."""
    count = call.query.shape[2]
    if call.ignores_constants:
        output, _ = sdpa.attention(
            module,
            call.query,
            keys,
            values,
            call.mask,
            dropout=call.dropout,
            scaling=call.scaling,
            is_causal=call.causal,
            position_bias=call.bias,
        )
        return output
    if call.causal and call.mask is None and count > 1:  # a static cache may hold memory for later tokens
        keys, values = keys[:, :, :count], values[:, :, :count]
    return attend(call, Plain(keys, values)).transpose(1, 2).contiguous()


Sums = tuple[Tensor, Tensor, Tensor]
"""The largest score, the sum of e^(score - largest), and the sum of values with these weights, fp32 (batch, key/value
heads, group * queries, 1 or width), over some tokens."""


def attend(call: Call, source: Source, others: Sums | None = None) -> Tensor:
    """Return the attention of queries to a source, (batch, heads, queries, width of the values).

    `others` are the sums over tokens that are not in the source, for at most `QUERIES` queries.

    Only a block of unpacked states and of scores is held at a time (Milakov and Gimelshein 2018, arXiv 1805.02867). The
    softmax is in fp32. A query that may read no token gets zeros. Raises `PermpruneError` if there is dropout.
    """
    if call.dropout:
        raise PermpruneError("a pruned cache, soft-capped scores and sinks go without dropout: call model.eval()")
    count = call.query.shape[2]
    starts = range(0, count, QUERIES)
    blocks = [_attend_block(call.rows(i, i + QUERIES), source, source.length - count + i, others) for i in starts]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _attend_block(call: Call, source: Source, first: int, others: Sums | None) -> Tensor:
    """Return `attend` for queries at positions from `first` on."""
    batch, heads, count, width = call.query.shape
    query = call.query.reshape(batch, source.heads, -1, width)
    softmax = _OnlineSoftmax(call.sinks, batch, source.heads, count)
    if others is not None:
        softmax.merge(*others)
    wide = torch.float32 if query.dtype == torch.float16 else query.dtype  # products of fp16 may exceed its largest
    block = min(SCORES // (batch * heads * count), STATES // (batch * source.heads * width))
    for segment in source.segments(first, count, max(block, LEAST_BLOCK)):
        keys, values = (states.to(wide) for states in (segment.keys, segment.values))
        scores = (query.to(wide) @ keys.transpose(-1, -2)).float().mul_(call.scaling)
        scores = scores.view(batch, source.heads, -1, count, scores.shape[-1])
        softmax.add(masked(scores, call, segment, first), values)
    return softmax.result().to(call.query.dtype).view(batch, heads, count, -1)


def masked(scores: Tensor, call: Call, segment: Segment, first: int) -> Tensor:
    """Cap scores, (batch, key/value heads, group, queries, tokens), and add biases and masks."""
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh_().mul_(call.softcap)
    stop = segment.start + scores.shape[-1]
    for added in (call.bias, call.mask):
        if added is None:
            continue
        part = added[..., segment.start : stop].unsqueeze(1)
        if part.shape[2] > 1:  # a mask for each head
            part = part.view(len(part), *scores.shape[1:3], *part.shape[3:])
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    visible = segment.visible
    if call.mask is None and call.causal and stop > first + 1:
        queries = torch.arange(first, first + scores.shape[3], device=scores.device)
        past = torch.arange(segment.start, stop, device=scores.device) <= queries[:, None]
        visible = past if visible is None else visible & past
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


class _OnlineSoftmax:
    """Sums of values weighted by softmax of the scores, which come in blocks of tokens.

    `sinks`, (heads,), are scores without values.
    """

    def __init__(self, sinks: Tensor | None, batch: int, heads: int, count: int) -> None:
        self.shape, self.sinks = (batch, heads, -1, count, 1), sinks
        self.largest: Tensor | None = None

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Add a block: scores fp32 (batch, heads, group, queries, tokens), values (batch, heads, tokens, width)."""
        largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        shares = (scores - largest).exp_()
        weighted = shares.flatten(2, 3).to(values.dtype) @ values
        self.merge(largest, shares.sum(-1, keepdim=True), weighted)

    def merge(self, largest: Tensor, total: Tensor, weighted: Tensor) -> None:
        """Add `Sums` over a block."""
        largest, total = (part.view(*self.shape[:2], -1, *self.shape[3:]) for part in (largest, total))
        weighted = weighted.float().view(*largest.shape[:-1], weighted.shape[-1])
        if self.largest is None:
            start = torch.full_like(largest, torch.finfo(torch.float32).min)
            if self.sinks is not None:
                start = self.sinks.float().view(1, self.shape[1], -1, 1, 1).expand_as(largest)
            self.largest, self.total = start, torch.full_like(largest, float(self.sinks is not None))
            self.sum = torch.zeros_like(weighted)
        most = torch.maximum(self.largest, largest)
        before, now = (self.largest - most).exp(), (largest - most).exp()
        self.total = self.total * before + total * now
        self.sum = self.sum * before + weighted * now
        self.largest = most

    def result(self) -> Tensor:
        """Return the weighted sums, fp32 (batch, heads, group, queries, width)."""
        return self.sum / self.total.clamp_min(torch.finfo(torch.float32).tiny)


class Plain(Source):
    """Keys and values as tensors; after the first `before` tokens there are `skipped` ones that they do not have."""

    def __init__(self, keys: Tensor, values: Tensor, before: int = 0, skipped: int = 0) -> None:
        self.keys, self.values, self.before, self.skipped = keys, values, before, skipped
        self.length, self.heads = keys.shape[2] + skipped, keys.shape[1]

    def segments(self, first: int, count: int, size: int) -> Iterator[Segment]:
        for start, stop, moved in ((0, self.before, 0), (self.before, self.keys.shape[2], self.skipped)):
            for begin in range(start, stop, size):
                part = slice(begin, min(begin + size, stop))
                yield Segment(begin + moved, self.keys[:, :, part], self.values[:, :, part])


def use_attention(model: PreTrainedModel) -> None:
    """Make a model compute attention through `attention`. Raises `PermpruneError` if it cannot."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    if config._attn_implementation != ATTENTION:
        raise PermpruneError(
            f"{type(model).__name__} does not use Transformers' attention interface: it cannot run with a pruned cache"
        )


def verify_attention(model: PreTrainedModel, tokens: Tensor) -> None:
    """Make a model use `attention` and check on a few tokens, (batch, length), that this does not change its outputs.

    Attention can do more than Transformers' interface tells. Raises `PermpruneError` if it does, or in the cases of
    `use_attention`; the model then computes attention as before.
    """
    before = model.config.get_text_config(decoder=True)._attn_implementation
    expected = model(input_ids=tokens).logits.float()
    use_attention(model)
    difference = (model(input_ids=tokens).logits.float() - expected).abs().max()
    if not difference <= SAME[model.dtype] * expected.abs().max():
        model.set_attn_implementation(before)
        raise PermpruneError(
            f"{type(model).__name__} computes attention in a way of its own: it cannot run with a pruned cache"
        )


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
