"""The layer of a pruned cache: packed past tokens, and whole ones at both ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.native import Queries, Side
from permprune.kernels.attention.native import attend as attend_native
from permprune.kernels.attention.states import WIDEST
from permprune.kernels.product.layout import FLOATS
from permprune.kernels.product.linear import has_triton
from permprune.kv.attention import Call, Segment, Source, States, Sums, attend, attend_plain, masked
from permprune.kv.config import KVConfig, pattern_of, stored_type
from permprune.kv.packing import Channels, Layout
from permprune.kv.tokens import PackedTokens

FEW = 16
"""Number of queries up to which the native kernel is used; for more, states are unpacked and multiplied as matrices."""

STEP = 8
"""Number of tokens that are packed at a time when they leave the window."""


class PrunedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one attention layer, of which all but the first and the newest tokens are packed.

    `keys` and `values`, (batch, heads, tokens, width) in the stored order of their channels, are the whole tokens: the
    first `sinks`, then those after the packed ones. A query that comes when there are `count` tokens reads
    `packed_count(count)` of them packed.

    With left padding, the whole first tokens of a row are the first ones that are read: padding is packed in their
    place. `places`, int64 (batch, tokens), are then the positions of the tokens as they stand here, sinks first. It is
    None if they stand in order.

    By default, tokens that come in one call read each other whole. With `exact_window` a query reads the same tokens
    packed in whatever calls the tokens come, as if one by one.
    """

    is_croppable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(
        self,
        config: KVConfig,
        key_channels: Channels | None = None,
        value_channels: Channels | None = None,
        exact_window: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.exact_window = config, exact_window
        self.channels = key_channels, value_channels
        self.packed: tuple[PackedTokens, PackedTokens] | None = None
        self.places: Tensor | None = None

    def packed_count(self, count: int) -> int:
        """Return how many of `count` tokens are packed: in steps of 8, so that at least `window` are whole."""
        return max(0, count - self.config.sinks - self.config.window) // STEP * STEP

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of this type and shape. Raises `PermpruneError` if the channels have another shape."""
        require_shape(self.channels, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        packed = []
        for name, states, channels in zip(("keys", "values"), (key_states, value_states), self.channels, strict=True):
            channels = channels or Channels.natural(states.shape[1], states.shape[3])
            pattern = pattern_of(getattr(self.config, name), states.shape[3], self.config.dtype)
            stored = stored_type(self.config.dtype) or states.dtype
            layout = Layout(pattern, stored, self.config.recovery == "sign")
            packed.append(PackedTokens(channels.to(self.device), layout))
        self.packed = packed[0], packed[1]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[States, States]:
        """Add the states of new tokens, (batch, heads, tokens, width); returns what their queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.packed is not None
        past, new = self.get_seq_length(), (key_states, value_states)
        channels = [packed.channels for packed in self.packed]
        arranged = [side.centred(side.arrange(states)) for side, states in zip(channels, new, strict=True)]
        whole = [torch.cat(pair, 2) for pair in zip((self.keys, self.values), arranged, strict=True)]
        count, before = past + key_states.shape[2], self.packed[0].length
        if self.places is not None:
            added = torch.arange(past, count, device=self.device).expand(len(key_states), -1)
            self.places = torch.cat((self.places, added), 1)
        view = _View(self, whole, before, new if not past and not self.exact_window else None)
        view.leaving = max(0, self.packed_count(count) - before)
        self.store(view)
        return view, view

    def store(self, view: _View) -> None:
        """Replace the tokens by those of a view, of which the leaving ones are packed."""
        assert self.packed is not None
        self.keys, self.values = view.whole
        if view.leaving:
            sinks, stop = self.config.sinks, self.config.sinks + view.leaving
            for packed, states in zip(self.packed, view.whole, strict=True):
                packed.truncate(view.before)
                packed.append(states[:, :, sinks:stop])
            self.keys, self.values = (torch.cat((s[:, :, :sinks], s[:, :, stop:]), 2) for s in view.whole)

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        if self.packed is None:
            return 0
        return int(self.keys.shape[2]) + self.packed[0].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens after `query_length` more, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the number of tokens is not limited."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.keys = self.values = self.packed = self.places = None  # type: ignore[assignment]
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens.

        If fewer than `window` whole tokens remain, those before them stay packed. Raises `ValueError` for a positive
        number, as the layers of Transformers do, and `PermpruneError` if hardly more than left padding would remain.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove == 0 or self.packed is None:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        sinks = min(left, self.config.sinks)
        packed = min(left - sinks, self.packed[0].length)
        if self.places is not None:
            self.places = self.places[:, :left]
            if (self.places >= left).any():
                raise PermpruneError("the cache is cropped into left padding: make a new one")
        for tokens in self.packed:
            tokens.truncate(packed)
        self.keys, self.values = (states[:, :, : left - packed].clone() for states in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, as beam search does."""
        self._change_batch(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._change_batch(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the batch."""
        self._change_batch(lambda part: part[indices.to(part.device)])

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.places = None if self.places is None else change(self.places)
            for packed in self.packed:
                packed.change_batch(change)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens as they come from the model."""
        if self.packed is None:
            return 0
        whole = (self.keys, self.values)
        return self.get_seq_length() * sum(s.element_size() * s.shape[0] * s.shape[1] * s.shape[3] for s in whole)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that hold states of tokens, or their places."""
        if self.packed is not None:
            yield from (self.keys, self.values)
            yield from () if self.places is None else (self.places,)
            for packed in self.packed:
                yield from packed.parts.values()


def require_shape(channels: tuple[Channels | None, Channels | None], keys: Tensor, values: Tensor) -> None:
    """Raise `PermpruneError` if the channels of keys or values have another shape than these states."""
    for name, own, states in zip(("keys", "values"), channels, (keys, values), strict=True):
        heads, width = states.shape[1], states.shape[3]
        if own is not None and own.shape != (heads, width):
            raise PermpruneError(
                f"the cache is for {name} of {own.shape[0]} heads of {own.shape[1]} channels, and the model has "
                f"{heads} of {width}: make one for this model with permprune kv"
            )


class _View(Source, States):
    """What the queries of one `update` attend to.

    `whole` are the keys and values that were whole before tokens were packed in this call: sinks, then those from
    position `sinks` + `before`, of which the first `leaving` are packed in this call. `plain` are the new keys and
    values in the model's order, if there are no others.
    """

    leaving = 0

    def __init__(
        self, layer: PrunedLayer, whole: list[Tensor], before: int, plain: tuple[Tensor, Tensor] | None
    ) -> None:
        assert layer.packed is not None
        self.layer, self.packed, self.whole, self.before, self.plain = layer, layer.packed, whole, before, plain
        self.heads, self.length = whole[0].shape[1], whole[0].shape[2] + before

    @property
    def shape(self) -> torch.Size:
        """The shape of the keys."""
        batch, heads, _, width = self.whole[0].shape
        return torch.Size((batch, heads, self.length, width))

    def attend(self, call: Call, module: nn.Module) -> Tensor:
        if self.leaving and self.layer.config.sinks and call.mask is not None:
            self._pack_padding_first(call.padding(self.length))
        if self.plain is not None:
            return attend_plain(call, module, *self.plain)
        if self.packed[0].channels.mean is not None and not call.ignores_constants:
            raise PermpruneError(
                "the cache stores keys without their means, which soft-capped scores and learned sinks need: "
                "make the cache again with permprune kv"
            )
        if self.layer.places is not None:
            call = call.at(self.layer.places)
        if self._runs_native(call):
            return self._attend_native(call)
        batch, heads, count, width = call.query.shape
        keys, values = (packed.channels for packed in self.packed)
        query = keys.arrange(call.query.reshape(batch, self.heads, -1, width)).view_as(call.query)
        arranged = dataclasses.replace(call, query=query)
        if self._runs_triton(call):
            output = attend(arranged, _Whole(self), self._read_packed(arranged))
        else:
            output = attend(arranged, self)
        output = values.restore(output.reshape(batch, self.heads, -1, output.shape[-1]))
        return output.view(batch, heads, count, -1).transpose(1, 2).contiguous()

    def _pack_padding_first(self, padding: Tensor) -> None:
        """Let the first tokens after `padding`, int64 (batch,), be the sinks, if some of them would be packed."""
        layer, sinks, count = self.layer, self.layer.config.sinks, self.layer.config.sinks + self.leaving
        if not padding.any():
            return
        positions = torch.arange(self.length, device=padding.device)
        slots = torch.cat((positions[:sinks], positions[sinks + self.before :][: self.leaving]))
        places = positions.expand(len(padding), -1) if layer.places is None else layer.places
        read = places[:, slots] >= padding[:, None]
        order = (~(read & (read.cumsum(1) <= sinks))).byte().argsort(stable=True, dim=1)
        if torch.equal(order, positions[:count].expand_as(order)):
            return
        layer.places = places.scatter(1, slots.expand_as(order), places[:, slots].gather(1, order))
        index = order[:, None, :, None]
        self.whole = [
            torch.cat((s[:, :, :count].gather(2, index.expand(-1, s.shape[1], -1, s.shape[3])), s[:, :, count:]), 2)
            for s in self.whole
        ]
        layer.store(self)

    def _runs_native(self, call: Call) -> bool:
        """Return whether the native kernel computes this: a few queries on the CPU that read the same packed tokens."""
        types = {call.query.dtype, *(states.dtype for states in self.whole)}
        packed = not self.before or all(tokens.native_states() is not None for tokens in self.packed)
        on_cpu = call.query.device.type == "cpu" and library.available()
        return on_cpu and packed and types <= set(FLOATS) and self._is_decoding(call)

    def _runs_triton(self, call: Call) -> bool:
        """Return whether the Triton kernel reads the packed tokens: for a few queries on a GPU."""
        return bool(self.before) and call.query.is_cuda and self._is_decoding(call) and has_triton()

    def _is_decoding(self, call: Call) -> bool:
        """Return whether kernels can compute this: a few queries without gradients that read the same packed tokens."""
        count = call.query.shape[2]
        if count > FEW or call.dropout or max(states.shape[3] for states in self.whole) > WIDEST:
            return False
        reads = {self._reads_packed(position) for position in range(self.length - count, self.length)}
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, *self.whole))
        return reads == {self.before} and not graph

    def _read_packed(self, call: Call) -> Sums:
        """Return the sums over the packed tokens, computed by the Triton kernel; queries are in the stored order."""
        from permprune.kernels.attention import gpu  # needs Triton, which comes with PyTorch's builds for GPUs

        batch, heads, count, width = call.query.shape
        added, softcap = None, call.softcap
        if call.mask is not None or call.bias is not None:
            shape = batch, self.heads, heads // self.heads, count, self.before
            plain = dataclasses.replace(call, softcap=None)
            segment = Segment(self._sinks, *self.whole)
            scores = masked(torch.zeros(shape, device=call.query.device), plain, segment, self.length - count)
            added = scores.flatten(2, 3)
        keys, values = (
            gpu.Packed(packed.parts, packed.channels.level, packed.layout.pattern) for packed in self.packed
        )
        query = call.query.reshape(batch, self.heads, -1, width).float() * call.scaling
        return gpu.attend(query, keys, values, self.before, added=added, softcap=softcap)

    @property
    def _sinks(self) -> int:
        """The number of whole tokens before the packed ones."""
        return min(self.layer.config.sinks, self.whole[0].shape[2])

    def _attend_native(self, call: Call) -> Tensor:
        mask, added = (
            (None, call.mask) if call.mask is not None and call.mask.dtype != torch.bool else (call.mask, None)
        )
        biases = [t[..., : self.length].float() for t in (call.bias, added) if t is not None]
        queries = Queries(
            call.query,
            call.scaling,
            call.softcap,
            mask=None if mask is None else mask[..., : self.length],
            added=sum(biases[1:], biases[0]) if biases else None,
            sinks=call.sinks,
            causal=call.causal and call.mask is None,
        )
        keys, values = (
            Side(packed.native_states() if self.before else None, whole, packed.channels.order)
            for packed, whole in zip(self.packed, self.whole, strict=True)
        )
        return attend_native(queries, keys, values, packed=self.before, before=self._sinks)

    def segments(self, first: int, count: int, size: int) -> Iterator[Segment]:
        (keys, values), sinks = self.whole, self.layer.config.sinks
        reads = [self._reads_packed(position) for position in range(first, first + count)]
        least, most = reads[0], reads[-1]
        limits = torch.tensor(reads, device=keys.device)[:, None]
        if sinks:
            yield Segment(0, keys[:, :, :sinks], values[:, :, :sinks])
        for start in range(0, most, size):
            stop = min(start + size, most)
            states = [packed.read(start, stop, keys.dtype) for packed in self.packed]
            visible = torch.arange(start, stop, device=keys.device) < limits if stop > least else None
            yield Segment(sinks + start, states[0], states[1], visible)
        for start in range(least, self.length - sinks, size):
            at, stop = sinks + start - self.before, min(start + size, self.length - sinks)
            states = [side[:, :, at : at + stop - start] for side in self.whole]
            visible = torch.arange(start, stop, device=keys.device) >= limits if start < most else None
            yield Segment(sinks + start, states[0], states[1], visible)

    def _reads_packed(self, position: int) -> int:
        """Return how many packed tokens a query reads."""
        return max(self.before, self.layer.packed_count(position)) if self.layer.exact_window else self.before


class _Whole(Source):
    """The tokens of a view that are not packed."""

    def __init__(self, view: _View) -> None:
        self.view, self.heads, self.length = view, view.heads, view.length

    def segments(self, first: int, count: int, size: int) -> Iterator[Segment]:
        sinks, packed = self.view._sinks, self.view.before
        for start, stop, skipped in ((0, sinks, 0), (sinks, self.length - packed, packed)):
            for at in range(start, stop, size):
                part = slice(at, min(at + size, stop))
                keys, values = (states[:, :, part] for states in self.view.whole)
                yield Segment(at + skipped, keys, values)
