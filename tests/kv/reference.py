"""A cache that keeps every token whole and prunes by itself what each query reads, for comparison."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from permprune.kv.attention import Call, States
from permprune.kv.bands import MixedLayer
from permprune.kv.coding import hadamard
from permprune.kv.config import KVConfig, pattern_of
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.moving import Moving
from permprune.kv.packing import TURNS, Channels, choose_channels, decode

PLAIN = KVConfig("2:4", "2:4", dtype="auto")
"""Groups of four, and values of the model's type, which a reference can compute as exactly."""


def random_channels(heads: int, width: int) -> Channels:
    """Channels in a random order, with random weights and levels."""
    order = torch.stack([torch.randperm(width) for _ in range(heads)])
    return Channels(order, torch.rand(heads, width) + 0.1, torch.rand(heads, width) + 0.1)


def coded_channels(bits: list[int], width: int, *, moving: bool = False) -> Channels:
    """Channels of heads in few bits with random weights, and means that move if `moving`."""
    shape = len(bits), width
    mean = Moving(*(torch.randn(2, *shape) * 5), torch.rand(shape)) if moving else None
    natural = Channels.natural(*shape)
    return Channels(natural.order, torch.rand(shape) + 0.5, natural.level, torch.tensor(bits), mean)


def pruned(states: Tensor, channels: Channels, text: str, recovery: str) -> Tensor:
    """States, (batch, heads, tokens, width), with what a pruned cache reads of them, in the model's order.

    The same channels are kept as in the cache.
    """
    pattern, result = pattern_of(text, states.shape[-1]), torch.zeros_like(states)
    if pattern is None:
        return states
    turns = TURNS if recovery == "sign" else 0
    kept, _ = choose_channels(channels.arrange(states), channels, pattern, turns=turns)
    for head, order in enumerate(channels.order):
        own, keeps = states[:, head][..., order], kept[:, head]
        signs = torch.where(own < 0, -1.0, 1.0)  # of zero too: torch.randn gives one in some millions of numbers
        weight, level = (t[head].expand_as(own) for t in (channels.weight, channels.level))
        design, target = ((weight * t).masked_fill(keeps, 0) for t in (level, own.abs()))
        size = (design * target).sum(-1) / (design * design).sum(-1)
        recovered = signs * size[..., None] * level if recovery == "sign" else torch.zeros_like(own)
        result[:, head][..., order] = torch.where(keeps, own, recovered)
    return result


def attend(
    call: Call, keys: Tensor, values: Tensor, small: tuple[Tensor, Tensor], packed: Tensor, sinks: int
) -> Tensor:
    """Attention of queries, of which query i reads the tokens before position `sinks` + packed[i] pruned.

    The first `sinks` tokens of a row that any query reads are not.
    """
    group = call.query.shape[1] // keys.shape[1]
    position = torch.arange(keys.shape[2])
    first = torch.zeros(len(keys), 1) if call.mask is None else (~call.mask[:, 0, -1]).int().cumprod(1).sum(1)[:, None]
    later = (position < first) | (position >= first + sinks)
    outputs = []
    for i, query in enumerate(call.query.unbind(2)):
        prune = (later & (position < sinks + packed[i]) & (packed[i] > 0))[:, None, :, None]
        own = [torch.where(prune, less, full) for less, full in zip(small, (keys, values), strict=True)]
        own = [states.repeat_interleave(group, 1) for states in own]
        scores = torch.einsum("bhd,bhtd->bht", query, own[0]) * call.scaling
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.bias is not None:
            scores = scores + call.bias[:, :, i]
        if call.mask is None:
            scores = scores.masked_fill(position > len(position) - call.query.shape[2] + i, -torch.inf)
        else:
            scores = scores.masked_fill(~call.mask[:, :, i], -torch.inf)
        if call.sinks is not None:
            scores = torch.cat((scores, call.sinks.view(1, -1, 1).expand(len(scores), -1, 1)), 2)
        shares = scores.softmax(-1).nan_to_num(0.0)[..., : len(position)]
        outputs.append(torch.einsum("bht,bhtd->bhd", shares, own[1]))
    return torch.stack(outputs, 1)


def attend_stored(layer: MixedLayer, call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """Attention in fp64 of queries to what a layer of heads in few bits holds, and to new keys and values."""
    group, count = call.query.shape[1] // keys.shape[1], layer.get_seq_length() + keys.shape[2]
    assert call.mask is not None
    result = call.query.new_zeros(len(keys), keys.shape[2], call.query.shape[1], values.shape[3], dtype=torch.float64)
    for heads, band in zip(layer.heads, layer.layers, strict=True):
        own = [
            torch.cat((past, new[:, heads].double()), 2) for past, new in zip(_held(band), (keys, values), strict=True)
        ]
        for i, head in enumerate(heads.tolist()):
            rows = slice(head * group, (head + 1) * group)
            scores = call.query[:, rows].double() @ own[0][:, i, None].transpose(-1, -2) * call.scaling
            shares = scores.masked_fill(~call.mask[..., :count], -torch.inf).softmax(-1).nan_to_num(0.0)
            result[:, :, rows] = (shares @ own[1][:, i, None]).transpose(1, 2)
    return result


def _held(layer: PackedCacheLayer) -> list[Tensor]:
    """The keys and values that a layer in few bits holds, in the order of their positions: fp64."""
    count, sinks, found = layer.get_seq_length(), min(layer.config.sinks, layer.keys.shape[2]), []
    places = torch.arange(count, device=layer.device)[None] if layer.places is None else layer.places
    for packed, whole in zip(layer.packed, (layer.keys, layer.values), strict=True):
        channels, parts = packed.channels, {name: part[:, :, : packed.length] for name, part in packed.parts.items()}
        stored = whole.double()
        if packed.length:
            own = decode(parts, channels, packed.layout, torch.float64)
            stored = torch.cat((stored[:, :, :sinks], own, stored[:, :, sinks:]), 2)
        rotation = hadamard(stored.shape[3], stored.device).double()
        states = stored @ rotation.T / channels.weight.double()[:, None]
        if channels.moving is not None and packed.length:
            part, padding = slice(sinks, sinks + packed.length), 0 if layer.padding is None else layer.padding[:, None]
            angle = (places[:, part] - padding)[:, None, :, None] * channels.moving.frequency.double()[:, None]
            mean, side = channels.moving.mean[:, None], channels.moving.side[:, None]
            states[:, :, part] += mean * angle.cos() + side * angle.sin()
        order = places.argsort(-1)[:, None, :, None].expand_as(states)
        found.append(states.gather(2, order))
    return found


class ReferenceLayer(DynamicLayer):
    """A layer of Transformers, whose queries read what those of a `PackedCacheLayer` would."""

    def __init__(self, config: KVConfig, channels: tuple[Channels, Channels], exact_window: bool = False) -> None:
        super().__init__()
        self.config, self.channels, self.exact_window = config, channels, exact_window

    def count(self, tokens: int) -> int:
        return max(0, (tokens - self.config.sinks - self.config.window) // 8 * 8)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[States, States]:
        past = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        positions = range(past, past + key_states.shape[2])
        packed = torch.tensor([self.count(p if self.exact_window else past) for p in positions])
        view = _View(self, keys, values, packed)
        return view, view


class _View(States):
    def __init__(self, layer: ReferenceLayer, keys: Tensor, values: Tensor, packed: Tensor) -> None:
        self.layer, self.keys, self.values, self.packed = layer, keys, values, packed

    def attend(self, call: Call, module: nn.Module) -> Tensor:
        config, channels = self.layer.config, self.layer.channels
        small = (
            pruned(self.keys, channels[0], config.keys, config.recovery),
            pruned(self.values, channels[1], config.values, config.recovery),
        )
        return attend(call, self.keys, self.values, small, self.packed, config.sinks)
