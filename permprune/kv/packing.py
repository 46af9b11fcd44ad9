"""Key or value states of tokens in packed form: which channels are kept, their values, and what is left of the others.

The layout is made for kernels that walk over the tokens of one head. All tensors are (batch, heads, tokens, ...) and
contiguous: the tokens of a head follow each other, and each is a row of bytes. For a head of `width` channels with
pattern N:M, the row of a token has these parts, channels in stored order (`Channels.order`):

* `values`, (width N / M): the kept values, in channel order; fp32, bf16, fp16 or int8. Of int5 uint8, half as many:
  places in `permprune.kernels.attention.codes.MAGNITUDES`, two in a byte, the first in the lower bits;
* `code`, uint8: which channels are kept (`permprune.kernels.attention.codes`); for 2:4, 3 bits for each group;
* `signs`, uint8 (ceil(width (M - N) / (8 M))), with recovery only: bit i is set if the i-th channel that is not kept is
  negative. Of int5 uint8 (ceil(width / 8)), with or without recovery: bit c is set if channel c is negative;
* `amplitude`, (1), with recovery only: a pruned channel c is read as its sign times `amplitude` times
  `Channels.level[c]`; of the type of the values, or for integers uint8 in steps of half the scale;
* `scale`, bf16 (1), for integers only: a kept value is its integer, or magnitude, times the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.attention.codes import (
    INT5,
    kept_count,
    pack_code,
    pack_magnitudes,
    pack_padded_bits,
    unpack_code,
    unpack_magnitudes,
)
from permprune.kernels.attention.states import SCALED, pack, packs
from permprune.kernels.product.packed import unpack_bits
from permprune.kv.config import DENSE
from permprune.pattern import Pattern

Parts = dict[str, Tensor]
"""The parts of packed states by name, each (batch, heads, tokens, ...)."""

SMALLEST, LARGEST = 1e-6, 1e6
"""The range of weights and levels, whose squared products have to stay in that of fp32, and of the size of means."""

TURNS = 2
"""Number of times that kept channels and amplitudes are fitted to each other."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of the key heads, or of the value heads, of a layer.

    `order` is int64 (heads, width): stored channel i of a head is the model's channel `order[i]`. `weight`, fp32
    (heads, width), is the importance of each stored channel, by which errors are multiplied. `level`, fp32 (heads,
    width), is the magnitude of each stored channel, relative to the others, where it is pruned. `mean`, fp32 (heads,
    width), is subtracted from the states of all tokens before they are stored, whole or packed. Keys may have one: what
    it takes from the scores of a query is the same for all tokens, which does not change their softmax. `kept`, int64
    (heads,), is how many channels each head keeps, where heads differ.
    """

    order: Tensor
    weight: Tensor
    level: Tensor
    mean: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def natural(cls, heads: int, width: int) -> Channels:
        """Return channels in the model's order, all of the same importance and magnitude."""
        ones = torch.ones(heads, width)
        return cls(torch.arange(width).repeat(heads, 1), ones, ones)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of heads and of channels of a head."""
        heads, width = self.order.shape
        return heads, width

    def check(self, name: str) -> None:
        """Raise `PermpruneError`, naming the tensors' `name`, unless orders are permutations and the rest in range."""
        identity = torch.arange(self.order.shape[-1]).expand(self.order.shape)
        if not torch.equal(self.order.sort(-1).values, identity):
            raise PermpruneError(f"{name} has an order that is no permutation: make the cache again with permprune kv")
        for what, numbers, least in (
            ("weights", self.weight, SMALLEST),
            ("levels", self.level, SMALLEST),
            ("means", self.mean, -LARGEST),
        ):
            if numbers is None:
                continue
            fits = numbers.is_floating_point() and numbers.shape == self.order.shape
            if not fits or not ((numbers >= least) & (numbers <= LARGEST)).all():
                raise PermpruneError(
                    f"{name} has {what} that are not one number from {least:g} to {LARGEST:g} for each channel: "
                    "make the cache again with permprune kv"
                )

        kept, (heads, width) = self.kept, self.shape
        if kept is not None and not (kept.shape == (heads,) and ((kept >= 1) & (kept <= width)).all()):
            raise PermpruneError(
                f"{name} does not keep from 1 to {width} channels of each head: make the cache again with permprune kv"
            )

    def to(self, device: torch.device) -> Channels:
        """Return the channels on a device."""
        return self._changed(lambda tensor: tensor.to(device))

    def of(self, heads: Tensor) -> Channels:
        """Return the channels of some heads."""
        return self._changed(lambda tensor: tensor[heads])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Channels:
        mean, kept = (None if tensor is None else change(tensor) for tensor in (self.mean, self.kept))
        return Channels(change(self.order), change(self.weight), change(self.level), mean, kept)

    def pattern_of(self, head: int) -> str:
        """Return the pattern of a head, all of whose channels are one group, as `KVConfig` has it."""
        assert self.kept is not None
        kept, width = int(self.kept[head]), self.shape[1]
        return DENSE if kept == width else f"{kept}:{width}"

    def arrange(self, states: Tensor) -> Tensor:
        """Put states, (batch, heads, tokens, width), into the stored order."""
        return states if self.is_natural else states.gather(-1, self.order[:, None].expand_as(states))

    def centred(self, states: Tensor) -> Tensor:
        """Return states in the stored order without their mean."""
        return states if self.mean is None else (states.float() - self.mean[:, None]).to(states.dtype)

    def restore(self, states: Tensor) -> Tensor:
        """Put states in the stored order, (batch, heads, tokens, width), into the model's order."""
        return states if self.is_natural else states.gather(-1, self._inverse[:, None].expand_as(states))

    @cached_property
    def is_natural(self) -> bool:
        """Whether the order is the model's."""
        return bool((self.order == torch.arange(self.order.shape[1], device=self.order.device)).all())

    @cached_property
    def _inverse(self) -> Tensor:
        return self.order.argsort(-1)


@dataclass(frozen=True)
class Layout:
    """The packed form of states: the pattern, None if all channels are kept; the type of values (of int5 `INT5`);
    recovery by `signs`, or zeros."""

    pattern: Pattern | None
    dtype: torch.dtype
    signs: bool


def encode(states: Tensor, channels: Channels, layout: Layout, turns: int = TURNS) -> Parts:
    """Pack states in the stored order, floating (batch, heads, tokens, width).

    With recovery, kept channels and amplitudes are fitted to each other in `turns` turns (`choose_channels`).
    """
    if layout.pattern is not None and packs(states, layout.dtype):
        return pack(
            states,
            channels.weight,
            channels.level,
            layout.pattern,
            dtype=layout.dtype,
            signs=layout.signs,
            turns=turns,
        )
    states = states.float()
    if layout.pattern is None:
        parts = _stored(states, layout.dtype)
    else:
        kept, size = choose_channels(states, channels, layout.pattern, turns=turns if layout.signs else 0)
        parts = _stored(_select(states, kept), layout.dtype)
        parts["code"] = pack_code(kept, layout.pattern)
        if layout.signs:
            parts["signs"] = pack_padded_bits(_select(states, ~kept) < 0)
            if "scale" in parts:
                steps = 2 * size / parts["scale"].float().clamp_min(TINY)
                parts["amplitude"] = steps.round().clamp(0, 255).to(torch.uint8)
            else:
                parts["amplitude"] = size.to(layout.dtype)
    if layout.dtype == INT5:
        parts["signs"] = pack_padded_bits(states < 0)
    return parts


def decode(parts: Parts, channels: Channels, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Unpack states, with pruned channels zero or recovered: `dtype` (batch, heads, tokens, width) in stored order."""
    values, scale, width = parts["values"], parts.get("scale"), channels.shape[1]
    if layout.dtype == INT5:
        values = unpack_magnitudes(values, kept_count(layout.pattern, width))
    if scale is not None:
        values = values * scale.float()
    states = values = values.to(dtype)
    if layout.pattern is not None:
        kept = unpack_code(parts["code"], layout.pattern, width)
        states = torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_scatter_(kept, values)
        if layout.signs:
            size = parts["amplitude"].float()
            if scale is not None:
                size = size * scale.float() / 2
            recovered = (~kept).float()
            if layout.dtype != INT5:
                signs = unpack_bits(parts["signs"])[..., : width - values.shape[-1]]
                recovered.masked_scatter_(~kept, 1.0 - 2.0 * signs)
            states += (recovered * size * channels.level[:, None]).to(dtype)
    return torch.where(unpack_bits(parts["signs"])[..., :width], -states, states) if layout.dtype == INT5 else states


def choose_channels(states: Tensor, channels: Channels, pattern: Pattern, *, turns: int) -> tuple[Tensor, Tensor]:
    """Return which channels of states in the stored order are kept, and the amplitudes of the others.

    Of each group those with the largest weight * |state| are kept. This loses least if the others become zero. For
    recovery it is the start of `turns` turns, in which those are kept that are recovered worst. Each turn lowers the
    error sum_c weight[c]^2 (|state[c]| - amplitude level[c])^2 over the pruned channels of a token and head.

    Returns bool (batch, heads, tokens, width) and fp32 (batch, heads, tokens, 1).
    """
    if packs(states, torch.float32):
        parts = pack(states, channels.weight, channels.level, pattern, dtype=torch.float32, signs=True, turns=turns)
        return unpack_code(parts["code"], pattern, channels.shape[1]), parts["amplitude"]
    magnitude, weight = states.float().abs(), channels.weight[:, None]
    kept = _largest(magnitude * weight, pattern)
    size = _amplitude(magnitude, kept, channels)
    for _ in range(turns):
        kept = _largest((magnitude - size * channels.level[:, None]).abs() * weight, pattern)
        size = _amplitude(magnitude, kept, channels)
    return kept, size


def _largest(score: Tensor, pattern: Pattern) -> Tensor:
    """Return where the N largest scores of each group are: bool (batch, heads, tokens, width)."""
    score = score.nan_to_num(nan=torch.inf)  # NaN is kept, for all to see
    kept: Tensor = pattern.mask_groups(score.unflatten(-1, (-1, pattern.m)), -1).flatten(-2)
    return kept


def _amplitude(magnitude: Tensor, kept: Tensor, channels: Channels) -> Tensor:
    """Return the amplitudes with the least error of `choose_channels`, fp32 (batch, heads, tokens, 1)."""
    squared = (channels.weight.square() * channels.level)[:, None]
    products = (magnitude * squared).masked_fill(kept, 0).sum(-1, keepdim=True)
    return products / (squared * channels.level[:, None]).masked_fill(kept, 0).sum(-1, keepdim=True)


TINY = torch.finfo(torch.float32).tiny

MOST = 127
"""The largest integer."""


def _stored(values: Tensor, dtype: torch.dtype) -> Parts:
    """Return values as `dtype`, with a scale for each token and head if those are integers; int5 without signs."""
    if dtype not in SCALED:
        return {"values": values.to(dtype)}
    scale = (values.abs().amax(-1, keepdim=True) / MOST).bfloat16()
    steps = values / scale.float().clamp_min(TINY)
    if dtype == INT5:
        return {"values": pack_magnitudes(steps.abs()), "scale": scale}
    return {"values": steps.round().clamp(-MOST, MOST).to(dtype), "scale": scale}


def _select(states: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen channels, as many for each token, (batch, heads, tokens, count)."""
    return states[chosen].view(*states.shape[:-1], -1)
