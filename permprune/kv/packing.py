"""Key or value states of tokens in packed form: which channels are kept, their values, and what is left of the others.

The layout is made for kernels that walk over the tokens of one head. All tensors are (batch, heads, tokens, ...) and
contiguous: the tokens of a head follow each other, and each is a row of bytes. For a head of `width` channels with
pattern N:M, the row of a token has these parts, channels in stored order (`Channels.order`):

* `values`, (width N / M): the kept values, in channel order; fp32, bf16, fp16 or int8;
* `code`, uint8 (ceil(width / 8)): which channels are kept, a bit for each;
* `signs`, uint8 (ceil(width (M - N) / (8 M))), with recovery only: bit i is set if the i-th channel that is not kept is
  negative;
* `amplitude`, (1), with recovery only: a pruned channel c is read as its sign times `amplitude` times
  `Channels.level[c]`; of the type of the values, or for integers uint8 in steps of half the scale;
* `scale`, bf16 (1), for integers only: a kept value is its integer times the scale.

States of few bits keep all channels; `permprune.kv.coding` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.states import CODED, NUMBERS, SCALED, WIDEST, PackedStates
from permprune.kernels.product.layout import FLOATS
from permprune.kernels.product.packed import pack_bits, unpack_bits
from permprune.kv import coding
from permprune.kv.moving import Moving
from permprune.pattern import COUNTED, Pattern

Parts = dict[str, Tensor]
"""The parts of packed states by name, each (batch, heads, tokens, ...)."""

SMALLEST, LARGEST = 1e-6, 1e6
"""The range of weights and levels, whose squared products have to stay in that of fp32, and of the size of means."""

BLOCK = 512
"""Number of tokens that are packed at a time, which bounds the memory for intermediate results."""

GROWTH = 64
"""Number of tokens for which memory is allocated when a few tokens are added and there is none left."""

TURNS = 2
"""Number of times that kept channels and amplitudes are fitted to each other."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of the key heads, or of the value heads, of a layer.

    `order` is int64 (heads, width): stored channel i of a head is the model's channel `order[i]`. `weight`, fp32
    (heads, width), is the importance of each stored channel, by which errors are multiplied. `level`, fp32 (heads,
    width), is the magnitude of each stored channel, relative to the others, where it is pruned.

    Heads in few bits have `bits`, int64 (heads,). Their channels are in the model's order, and stored multiplied by
    `weight` and rotated. Keys may have a mean, which is `moving`: it is subtracted from packed tokens, and what it adds
    to the scores of a query is computed apart.
    """

    order: Tensor
    weight: Tensor
    level: Tensor
    bits: Tensor | None = None
    moving: Moving | None = None

    @classmethod
    def natural(cls, heads: int, width: int, bits: int | None = None) -> Channels:
        """Return channels in the model's order, all of the same importance and magnitude."""
        ones = torch.ones(heads, width)
        of_heads = None if bits is None else torch.full((heads,), bits)
        return cls(torch.arange(width).repeat(heads, 1), ones, ones, of_heads)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of heads and of channels of a head."""
        heads, width = self.order.shape
        return heads, width

    def check(self, name: str) -> None:
        """Raise `PermpruneError`, naming the tensors' `name`, unless orders are permutations and the rest in range."""
        faults, identity = [], torch.arange(self.order.shape[-1]).expand(self.order.shape)
        if not torch.equal(self.order.sort(-1).values, identity):
            faults.append("has an order that is no permutation")
        for what, numbers, least in (
            ("weights", self.weight, SMALLEST),
            ("levels", self.level, SMALLEST),
            *(("means", getattr(self.moving, part), -LARGEST) for part in ("mean", "side", "frequency") if self.moving),
        ):
            fits = numbers.is_floating_point() and numbers.shape == self.order.shape
            if not fits or not ((numbers >= least) & (numbers <= LARGEST)).all():
                faults.append(f"has {what} that are not one number from {least:g} to {LARGEST:g} for each channel")
        bits, least, most = self.bits, coding.BITS[0], coding.BITS[-1]
        if bits is not None and not (bits.shape == self.shape[:1] and ((bits >= least) & (bits <= most)).all()):
            faults.append(f"does not have {least} to {most} bits for each head")
        if faults:
            raise PermpruneError(f"{name} {faults[0]}: make the cache again with permprune kv")

    def to(self, device: torch.device) -> Channels:
        """Return the channels on a device."""
        return self._changed(lambda part: part.to(device))

    def of(self, heads: Tensor) -> Channels:
        """Return the channels of some heads."""
        return self._changed(lambda part: part[heads])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Channels:
        moving = None if self.moving is None else self.moving.changed(change)
        bits = None if self.bits is None else change(self.bits)
        return Channels(change(self.order), change(self.weight), change(self.level), bits, moving)

    def arrange(self, states: Tensor) -> Tensor:
        """Put states, (batch, heads, tokens, width), into the form in which they are stored."""
        if self.bits is not None:
            return ((states.float() * self.weight[:, None]) @ self._rotation).to(states.dtype)
        return states if self.is_natural else states.gather(-1, self.order[:, None].expand_as(states))

    def arrange_query(self, query: Tensor) -> Tensor:
        """Return queries, (batch, heads, rows, width), whose products with stored keys are those with the keys."""
        if self.bits is None:
            return self.arrange(query)
        return (query.float() / self.weight[:, None]) @ self._rotation

    def restore(self, states: Tensor) -> Tensor:
        """Undo `arrange`."""
        if self.bits is not None:
            return (states.float() @ self._rotation.T / self.weight[:, None]).to(states.dtype)
        return states if self.is_natural else states.gather(-1, self._inverse[:, None].expand_as(states))

    @cached_property
    def is_natural(self) -> bool:
        """Whether the order is the model's."""
        return bool((self.order == torch.arange(self.order.shape[1], device=self.order.device)).all())

    @cached_property
    def _inverse(self) -> Tensor:
        return self.order.argsort(-1)

    @property
    def _rotation(self) -> Tensor:
        return coding.hadamard(self.shape[1], self.weight.device)


@dataclass(frozen=True)
class StatesLayout:
    """The packed form of states: the pattern, None if all channels are kept; the type of values; recovery by `signs`,
    or zeros."""

    pattern: Pattern | None
    dtype: torch.dtype
    signs: bool


def encode(states: Tensor, channels: Channels, layout: StatesLayout, turns: int = TURNS) -> Parts:
    """Pack states in the stored order, floating (batch, heads, tokens, width).

    With recovery, kept channels and amplitudes are fitted to each other in `turns` turns (`choose_channels`).
    """
    if layout.dtype in CODED:
        return coding.code(states, CODED[layout.dtype])
    states = states.float()
    if layout.pattern is None:
        parts = _stored(states, layout.dtype)
    else:
        kept, size = choose_channels(states, channels, layout.pattern, turns=turns if layout.signs else 0)
        parts = _stored(_select(states, kept), layout.dtype)
        parts["code"] = pack_bits(kept)
        if layout.signs:
            parts["signs"] = pack_bits(_select(states, ~kept) < 0)
            if "scale" in parts:
                steps = 2 * size / parts["scale"].float().clamp_min(TINY)
                parts["amplitude"] = steps.round().clamp(0, 255).to(torch.uint8)
            else:
                parts["amplitude"] = size.to(layout.dtype)
    return parts


def decode(parts: Parts, channels: Channels, layout: StatesLayout, dtype: torch.dtype) -> Tensor:
    """Unpack states, with pruned channels zero or recovered: `dtype` (batch, heads, tokens, width) in stored order."""
    values, scale, width = parts["values"], parts.get("scale"), channels.shape[1]
    if layout.dtype in CODED:
        return coding.decode(parts, CODED[layout.dtype], width).to(dtype)
    if scale is not None:
        values = values * scale.float()
    states = values = values.to(dtype)
    if layout.pattern is not None:
        kept = unpack_bits(parts["code"])[..., :width]
        states = torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_scatter_(kept, values)
        if layout.signs:
            size = parts["amplitude"].float()
            if scale is not None:
                size = size * scale.float() / 2
            signs = unpack_bits(parts["signs"])[..., : width - values.shape[-1]]
            recovered = (~kept).float().masked_scatter_(~kept, 1.0 - 2.0 * signs)
            states += (recovered * size * channels.level[:, None]).to(dtype)
    return states


def choose_channels(states: Tensor, channels: Channels, pattern: Pattern, *, turns: int) -> tuple[Tensor, Tensor]:
    """Return which channels of states in the stored order are kept, and the amplitudes of the others.

    Of each group those with the largest weight * |state| are kept. This loses least if the others become zero. For
    recovery it is the start of `turns` turns, in which those are kept that are recovered worst. Each turn lowers the
    error sum_c weight[c]^2 (|state[c]| - amplitude level[c])^2 over the pruned channels of a token and head.

    Returns bool (batch, heads, tokens, width) and fp32 (batch, heads, tokens, 1).
    """
    magnitude, weight = states.float().abs(), channels.weight[:, None]
    kept = _largest(magnitude * weight, pattern)
    size = _amplitude(magnitude, kept, channels)
    for _ in range(turns):
        kept = _largest((magnitude - size * channels.level[:, None]).abs() * weight, pattern)
        size = _amplitude(magnitude, kept, channels)
    return kept, size


def _largest(score: Tensor, pattern: Pattern) -> Tensor:
    """Return where the N largest scores of each group are: bool (batch, heads, tokens, width)."""
    groups = score.nan_to_num(nan=torch.inf).unflatten(-1, (-1, pattern.m))  # NaN is kept, for all to see
    if pattern.m <= COUNTED:
        return pattern.mask_groups(groups, -1).flatten(-2)
    largest = groups.topk(pattern.n, sorted=False).indices  # does not sort the others
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True).flatten(-2)


def _amplitude(magnitude: Tensor, kept: Tensor, channels: Channels) -> Tensor:
    """Return the amplitudes with the least error of `choose_channels`, fp32 (batch, heads, tokens, 1)."""
    squared = (channels.weight.square() * channels.level)[:, None]
    products = (magnitude * squared).masked_fill(kept, 0).sum(-1, keepdim=True)
    return products / ((~kept).float() @ (squared * channels.level[:, None]).mT)


TINY = torch.finfo(torch.float32).tiny

MOST = 127
"""The largest integer."""


def _stored(values: Tensor, dtype: torch.dtype) -> Parts:
    """Return values as `dtype`, with a scale for each token and head if those are integers."""
    if dtype not in SCALED:
        return {"values": values.to(dtype)}
    scale = (values.abs().amax(-1, keepdim=True) / MOST).bfloat16()
    steps = values / scale.float().clamp_min(TINY)
    return {"values": steps.round().clamp(-MOST, MOST).to(dtype), "scale": scale}


def _select(states: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen channels, as many for each token, (batch, heads, tokens, count)."""
    return states.masked_select(chosen).view(*states.shape[:-1], -1)


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """A context in which new tensors can be written to later, in inference mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class PackedTokens:
    """Packed states of the tokens of a layer, keys or values, in the stored order of their channels.

    `parts` are those of `permprune.kv.packing`, with memory for more than the `length` tokens that are used.
    """

    def __init__(self, channels: Channels, layout: StatesLayout) -> None:
        self.channels, self.layout = channels, layout
        self.parts: Parts = {}
        self.length = 0
        self._states: PackedStates | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_states": None}  # pointers are not copied

    def append(self, states: Tensor) -> None:
        """Pack states, (batch, heads, tokens, width), and add them at the end."""
        left = states.shape[2]
        for block in states.detach().split(BLOCK, 2):
            self._write(encode(block, self.channels, self.layout), left)
            left -= block.shape[2]

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Unpack tokens `start` to `stop`: (batch, heads, stop - start, width), in the stored order."""
        states = self.native_states() if dtype in FLOATS else None
        if states is not None:
            return states.unpack(start, stop - start, dtype)
        parts = {name: part[:, :, start:stop] for name, part in self.parts.items()}
        return decode(parts, self.channels, self.layout, dtype)

    def native_states(self) -> PackedStates | None:
        """Return the parts as native kernels read them; None if there are no parts, or no kernels for them."""
        if self._states is None and self.parts:
            values, width = self.parts["values"], self.channels.shape[1]
            runs = values.device.type == "cpu" and self.layout.dtype in NUMBERS and width <= WIDEST
            if runs and library.available():
                self._states = PackedStates(self.parts, self.channels.level, self.layout.pattern, self.layout.dtype)
        return self._states

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `change(part)`, which selects or repeats rows of the batch."""
        self._states = None
        with _ordinary_tensors():
            self.parts = {name: change(part).contiguous() for name, part in self.parts.items()}

    def _write(self, parts: Parts, coming: int) -> None:
        """Write parts behind the used tokens, with memory for all `coming` tokens; no more than that for the first."""
        count = parts["values"].shape[2]
        if not self.parts or self.length + count > self.parts["values"].shape[2]:
            self._grow(parts, self.length + max(coming, GROWTH if self.length else 0))
        for name, part in parts.items():
            self.parts[name][:, :, self.length : self.length + count] = part
        self.length += count

    def _grow(self, like: Parts, capacity: int) -> None:
        """Allocate memory for `capacity` tokens and move the used ones there, one part after the other."""
        self._states = None
        for name, part in like.items():
            with _ordinary_tensors():
                grown = torch.empty(*part.shape[:2], capacity, *part.shape[3:], dtype=part.dtype, device=part.device)
            if self.length:
                grown[:, :, : self.length] = self.parts[name][:, :, : self.length]
            self.parts[name] = grown
