"""What a cache is calibrated on: queries, keys and values of every layer with full attention, from forward passes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kv.attention import Call, States, StatesLayer, attend_plain, verify_attention
from permprune.kv.cache import attention_layers
from permprune.kv.coding import balance
from permprune.kv.moving import Moving, Rotary, rotaries_of
from permprune.kv.packing import LARGEST, SMALLEST, TURNS, Channels, choose_channels
from permprune.models.forward import cache_argument, frozen, model_inputs
from permprune.pattern import Pattern
from permprune.system.device import compute_device
from permprune.system.progress import track

TOKENS = 2048
"""Number of tokens of which the keys and values are held."""

VERIFIED = 64
"""Number of tokens on which the model is compared with itself under permprune's attention."""

ROUNDS = 4
"""Number of times that levels are fitted to kept channels and amplitudes."""

PROBES = 4
"""The most examples of which attention is computed again with pruned states."""

QUERIES = 32
"""Number of queries of a probe, its newest tokens."""

SIDES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class AttentionProbe:
    """The newest queries of an example, and the keys and values that they read: (1, heads, tokens, width), in fp32."""

    call: Call
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, call: Call, keys: Tensor, values: Tensor, skipped: int) -> AttentionProbe:
        """Return the probe of the first row of a batch, with at most half of the tokens after the `skipped` ones."""
        count = call.query.shape[2]
        part = call.rows(max((skipped + count) // 2, count - QUERIES), count)
        row = {name: tensor[:1].cpu() for name in ("mask", "bias") if (tensor := getattr(part, name)) is not None}
        query, keys, values = (states[:1].float().cpu().clone() for states in (part.query, keys, values))
        sinks = None if call.sinks is None else call.sinks.cpu()
        return cls(dataclasses.replace(part, query=query, sinks=sinks, **row), keys, values)


@dataclass
class ObservedLayer:
    """The states of one layer: a sample of tokens without the first `skipped` of each example, every `stride`-th."""

    skipped: int
    stride: int
    squares: Tensor | None = None
    """Sums of squares of the queries that read a key/value head, fp64 (heads, width)."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    centres_keys: bool = True
    """Whether keys can be stored without their mean: scores are not soft-capped."""

    rotaries: list[Rotary] = field(default_factory=list)
    """How the model may turn the keys (`rotaries_of`)."""

    probes: list[AttentionProbe] = field(default_factory=list)
    """Examples of attention, one of each batch."""

    @property
    def heads(self) -> int:
        """The number of key/value heads."""
        return len(self.keys[0])

    def width_of(self, side: str) -> int:
        """Return the number of channels of a head of the keys or of the values."""
        states: list[Tensor] = getattr(self, side)
        return states[0].shape[2]

    def add(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add the states of new tokens, (batch, heads, tokens, width), after positions are encoded."""
        batch, heads, _, width = keys.shape
        squares = query.reshape(batch, heads, -1, width).double().square().sum((0, 2)).cpu()
        self.squares = squares if self.squares is None else self.squares + squares
        for states, held in ((keys, self.keys), (values, self.values)):
            sample = states[:, :, self.skipped :: self.stride].float().cpu()
            held.append(sample.transpose(0, 1).flatten(1, 2))
        self.positions.append(torch.arange(self.skipped, keys.shape[2], self.stride).repeat(batch))

    def states(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, fp32 (heads, tokens, width)."""
        return torch.cat(self.keys, 1), torch.cat(self.values, 1)

    def side(self, side: str) -> tuple[Tensor, Tensor]:
        """Return the "keys" or "values", fp32 (heads, tokens, width), and their weights, (heads, width)."""
        states = self.states()[SIDES.index(side)]
        return states, torch.ones(len(states), states.shape[2]) if side == "values" else self.query_weights()

    def coded(self, side: str, bits: Tensor, moving: Moving | None = None) -> Channels:
        """Return the channels of a side in few bits, int64 (heads,), with a mean of the keys."""
        states, weight = self.side(side)
        if moving is not None:
            states = states - moving.at(torch.cat(self.positions)[None])[0]
        factor = balance(states, weight).clamp(SMALLEST, LARGEST)
        return Channels(
            Channels.natural(*weight.shape).order, factor, (1 / factor).clamp(SMALLEST, LARGEST), bits, moving
        )

    def query_weights(self) -> Tensor:
        """Return the root mean square of each channel of the queries, relative to the largest of its head."""
        assert self.squares is not None
        rms = self.squares.sqrt()
        return (rms / rms.amax(-1, keepdim=True)).float().clamp_min(1e-4)


@torch.inference_mode()
def observe_states(
    model: PreTrainedModel, examples: Examples, *, skipped: int = 0, batch: int = 4
) -> dict[int, ObservedLayer]:
    """Run a model on examples and return what its layers with full attention read, by number.

    Of each example the first `skipped` tokens, which stay whole, are not held. Raises `PermpruneError` for a model that
    cannot have a pruned cache (`verify_attention`), or if hardly more than the first tokens would be left.
    """
    layers, full = attention_layers(model)
    padded = examples.get("attention_mask")
    tokens = examples["input_ids"].numel() if padded is None else int(padded.sum())
    longest = examples["input_ids"].shape[1] if padded is None else int(padded.sum(1).max())
    if longest < skipped + 2:
        raise PermpruneError(
            f"calibration texts of up to {longest} tokens are too short for {skipped} sinks: raise --length"
        )
    parts = examples.split(batch if padded is None else 1)  # one by one there is no padding
    stride = max(1, math.ceil(tokens / TOKENS))
    observed = {i: ObservedLayer(skipped, stride) for i in full}
    device = compute_device(model)
    with frozen(model):
        verify_attention(model, examples["input_ids"][:1, :VERIFIED].to(device))
        for part in track([part.trimmed() for part in parts], "observing keys and values"):
            cache = Cache(layers=[_Layer(observed[i]) if i in observed else layers[i] for i in range(len(layers))])
            model(**model_inputs(model, part.to(device)), **cache_argument(model, cache))
            layers, _ = attention_layers(model)
    for layer in observed.values():
        layer.rotaries = rotaries_of(model, layer.width_of("keys"))
    return observed


def fit_channels(states: Tensor, weight: Tensor, order: Tensor, pattern: Pattern | None) -> Channels:
    """Return the channels of an order, with the levels that recover pruned channels with the least error.

    `states` are fp32 (heads, tokens, width) and `weight` (heads, width), both in the model's order. Levels and the
    tokens' amplitudes minimise sum (weight (|state| - amplitude level))^2 over the pruned channels in turns.
    """
    weight = weight.gather(1, order)
    channels = Channels(order, weight, 1 / weight)
    if pattern is None:
        return channels
    arranged = channels.arrange(states[None])
    size = arranged.abs()
    for _ in range(ROUNDS):
        kept, factor = choose_channels(arranged, channels, pattern, turns=TURNS)
        pruned = (~kept).float()
        products, squares = (size * factor * pruned).sum(2)[0], (factor.square() * pruned).sum(2)[0]
        level = torch.where((squares > 0) & (products > 0), products / squares, channels.level)
        level = level.clamp(SMALLEST, LARGEST)
        channels = Channels(order, weight, level)
    return channels


class _Layer(StatesLayer):
    """A cache layer that holds nothing, and whose states record what attention reads."""

    def __init__(self, observed: ObservedLayer) -> None:
        super().__init__()
        self.observed = observed

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[States, States]:
        view = _View(self.observed, key_states, value_states)
        return view, view


class _View(States):
    def __init__(self, observed: ObservedLayer, keys: Tensor, values: Tensor) -> None:
        self.observed, self.keys, self.values, self.shape = observed, keys, values, keys.shape

    def attend(self, call: Call, module: nn.Module) -> Tensor:
        self.observed.add(call.query, self.keys, self.values)
        self.observed.centres_keys &= call.softcap is None
        if len(self.observed.probes) < PROBES:
            self.observed.probes.append(AttentionProbe.of(call, self.keys, self.values, self.observed.skipped))
        return attend_plain(call, module, self.keys, self.values)
