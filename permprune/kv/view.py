"""What the queries of one update of a pruned layer attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.native import Side
from permprune.kernels.attention.native import attend as attend_native
from permprune.kernels.attention.states import CODED, WIDEST
from permprune.kernels.product.layout import FLOATS
from permprune.kv.attention import Call, Plain, Segment, Source, States, Sums, attend, attend_plain, masked

if TYPE_CHECKING:
    from permprune.kv.layer import PackedCacheLayer

FEW = 16
"""Number of queries up to which the native kernel is used; for more, states are unpacked and multiplied as matrices."""


class View(Source, States):
    """What the queries of one `update` attend to.

    `whole` are the keys and values that were whole before tokens were packed in this call: sinks, then those from
    position `sinks` + `before`, of which the first `leaving` are packed in this call. `plain` are the new keys and
    values in the model's order, if there are no others.
    """

    leaving = 0

    def __init__(
        self, layer: PackedCacheLayer, whole: list[Tensor], before: int, plain: tuple[Tensor, Tensor] | None
    ) -> None:
        assert layer.packed is not None
        self.layer, self.packed, self.whole, self.before, self.plain = layer, layer.packed, whole, before, plain
        batch, self.heads, count, width = whole[0].shape
        self.length = before + count
        self.shape = torch.Size((batch, self.heads, self.length, width))

    def attend(self, call: Call, module: nn.Module) -> Tensor:
        if self.leaving and call.mask is not None:
            self._pack_padding_first(call.padding(self.length))
        if self.plain is not None:
            return attend_plain(call, module, *self.plain)
        if self.packed[0].channels.moving is not None and call.softcap is not None:
            raise PermpruneError(
                "the cache stores keys without their means, which soft-capped scores need: "
                "make the cache again with permprune kv"
            )
        if self.layer.places is not None:
            call = call.at(self.layer.places)
        batch, heads, count, width = call.query.shape
        (keys, values), native = (packed.channels for packed in self.packed), self._runs_native(call)
        grouped, fused = call.query.reshape(batch, self.heads, -1, width), native or self._runs_triton(call)
        means = self._mean_scores(grouped * call.scaling) if fused else None
        if not native or keys.bits is not None:  # the native kernel knows orders, not rotations
            call = dataclasses.replace(call, query=keys.arrange_query(grouped).view_as(call.query))
        if native:
            output = self._attend_native(call, means).transpose(1, 2)
        else:
            sums = self._read_packed(call, means) if fused else None
            call = dataclasses.replace(call, query=call.query.to(grouped.dtype))
            whole = Plain(self.whole[0], self.whole[1], self._sinks, self.before)
            output = attend(call, whole if fused else self, sums)
        if not native or values.bits is not None:
            output = values.restore(output.reshape(batch, self.heads, -1, output.shape[-1]))
        return output.view(batch, heads, count, -1).transpose(1, 2).to(grouped.dtype).contiguous()

    def _mean_scores(self, query: Tensor) -> Tensor | None:
        """Return what moving means add to the scores of queries, (batch, key/value heads, rows, width), with packed
        tokens, fp32 (batch, heads, rows, tokens); None if there are none."""
        layer, moving = self.layer, self.packed[0].channels.moving
        if moving is None or not self.before:
            return None
        padding = torch.zeros(1, dtype=torch.int64, device=query.device) if layer.padding is None else layer.padding
        if layer.places is None:
            return moving.scores(query, self._sinks - padding, self.before)
        scores = moving.scores(query, -padding, self._sinks + self.before)
        places = layer.places[:, None, None, self._sinks : self._sinks + self.before]
        return scores.gather(-1, places.expand(*scores.shape[:-1], -1))

    def _pack_padding_first(self, padding: Tensor) -> None:
        """Let the first tokens after `padding`, int64 (batch,), be the sinks, if some of them would be packed."""
        layer, sinks, count = self.layer, self.layer.config.sinks, self.layer.config.sinks + self.leaving
        if not padding.any():
            return
        moves = not self.before and self.packed[0].channels.moving is not None
        if moves:
            layer.padding = padding
        positions = torch.arange(self.length, device=padding.device)
        slots = torch.cat((positions[:sinks], positions[sinks + self.before :][: self.leaving]))
        places = positions.expand(len(padding), -1) if layer.places is None else layer.places
        read = places[:, slots] >= padding[:, None]
        order = (~(read & (read.cumsum(1) <= sinks))).byte().argsort(stable=True, dim=1)
        if torch.equal(order, positions[:count].expand_as(order)):
            if moves:
                layer.store(self)
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
        return bool(self.before) and self._is_decoding(call) and library.runs_triton(call.query.device.type)

    def _is_decoding(self, call: Call) -> bool:
        """Return whether kernels can compute this: a few queries without gradients that read the same packed tokens."""
        count = call.query.shape[2]
        if count > FEW or call.dropout or max(states.shape[3] for states in self.whole) > WIDEST:
            return False
        reads = {self._reads_packed(position) for position in range(self.length - count, self.length)}
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, *self.whole))
        return reads == {self.before} and not graph

    def _read_packed(self, call: Call, means: Tensor | None) -> Sums:
        """Return the sums over the packed tokens, computed by the Triton kernel; queries are in the stored order, and
        `means` are what means of keys add to their scores."""
        from permprune.kernels.attention import gpu  # needs Triton, which comes with PyTorch's builds for GPUs

        batch, heads, count, width = call.query.shape
        added, softcap = means, call.softcap
        if call.mask is not None or call.bias is not None:
            shape = batch, self.heads, heads // self.heads, count, self.before
            plain = dataclasses.replace(call, softcap=None)
            segment = Segment(self._sinks, *self.whole)
            scores = masked(torch.zeros(shape, device=call.query.device), plain, segment, self.length - count)
            added = scores.flatten(2, 3) if means is None else scores.flatten(2, 3) + means
        keys, values = (
            gpu.PackedTensors(
                packed.parts, packed.channels.level, packed.layout.pattern, CODED.get(packed.layout.dtype, 0)
            )
            for packed in self.packed
        )
        query = call.query.reshape(batch, self.heads, -1, width).float() * call.scaling
        return gpu.attend(query, keys, values, self.before, added=added, softcap=softcap)

    @property
    def _sinks(self) -> int:
        """The number of whole tokens before the packed ones."""
        return min(self.layer.config.sinks, self.whole[0].shape[2])

    def _attend_native(self, call: Call, means: Tensor | None) -> Tensor:
        batch, heads, count, _ = call.query.shape
        mask, added = (
            (None, call.mask) if call.mask is not None and call.mask.dtype != torch.bool else (call.mask, None)
        )
        biases = [t[..., : self.length].float() for t in (call.bias, added) if t is not None]
        if means is not None:  # nothing for whole tokens
            means = F.pad(means, (self._sinks, self.length - self._sinks - self.before))
            biases.append(means.view(batch, heads, count, -1))
        keys, values = (
            Side(packed.native_states() if self.before else None, whole, packed.channels.order)
            for packed, whole in zip(self.packed, self.whole, strict=True)
        )
        return attend_native(
            call.query,
            keys,
            values,
            packed=self.before,
            before=self._sinks,
            scaling=call.scaling,
            softcap=call.softcap,
            mask=None if mask is None else mask[..., : self.length],
            added=sum(biases[1:], biases[0]) if biases else None,
            sinks=call.sinks,
            causal=call.causal and call.mask is None,
        )

    def segments(self, first: int, count: int, size: int) -> Iterator[Segment]:
        (keys, values), sinks = self.whole, self.layer.config.sinks
        reads = [self._reads_packed(position) for position in range(first, first + count)]
        least, most = reads[0], reads[-1]
        limits = torch.tensor(reads)[:, None].to(keys.device)
        if sinks:
            yield Segment(0, keys[:, :, :sinks], values[:, :, :sinks])
        for start in range(0, most, size):
            stop = min(start + size, most)
            states = [packed.read(start, stop, keys.dtype) for packed in self.packed]
            if self.packed[0].channels.moving is not None:
                states[0] = (states[0] + self.layer.means(self.packed[0], start, stop)).to(keys.dtype)
            visible = torch.arange(start, stop, device=keys.device) < limits if stop > least else None
            yield Segment(sinks + start, states[0], states[1], visible)
        for start in range(least, self.length - sinks, size):
            first_row, stop = sinks + start - self.before, min(start + size, self.length - sinks)
            states = [side[:, :, first_row : first_row + stop - start] for side in self.whole]
            visible = torch.arange(start, stop, device=keys.device) >= limits if start < most else None
            yield Segment(sinks + start, states[0], states[1], visible)

    def _reads_packed(self, position: int) -> int:
        """Return how many packed tokens a query reads."""
        return max(self.before, self.layer.packed_count(position)) if self.layer.exact_window else self.before
