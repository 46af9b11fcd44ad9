"""Reference implementations of other key/value caches, with the bytes that they take.

They are layers of a `PrunedCache` with other packed tokens, so that the same first and newest tokens stay whole and the
same attention reads them:

* SparK (arXiv 2508.15212): the channels of each token with the largest weighted states, the others from their signs;
* integers with one fp16 scale for each 32 channels of a token, as llama.cpp's q4_0, or with a minimum too, as q4_1,
  also after a Hadamard rotation of the head (llama.cpp pull request 21038);
* TurboQuant (arXiv 2504.19874): a random rotation of the head, then the Lloyd-Max codes of a normal distribution
  (Max 1960, Quantizing for minimum distortion), with one fp16 scale for each token, here that with the least error;
* KIVI (arXiv 2402.02750): integers with a minimum and a step, of keys for each channel of 32 tokens, of values for each
  32 channels of a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from permprune.kernels.product.packed import pack_bits, unpack_bits
from permprune.kv.coding import hadamard as hadamard_on
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import TINY, Channels, PackedTokens, Parts, StatesLayout, encode

GROUP = 32
"""Number of states with a scale of their own."""

Tokens = Callable[[Channels, StatesLayout], PackedTokens]


class Form(ABC):
    """How the states of tokens, fp32 (batch, heads, tokens, width), are stored; `step` tokens are coded together."""

    step = 1

    @abstractmethod
    def encode(self, states: Tensor) -> Parts:
        """Return the parts, each (batch, heads, tokens, ...)."""

    @abstractmethod
    def decode(self, parts: Parts, width: int) -> Tensor:
        """Return the states that parts stand for."""


@dataclass(frozen=True)
class Scaled(Form):
    """Integers of `bits` bits times a scale, that of the state with the largest magnitude (q4_0)."""

    bits: int = 4

    def encode(self, states: Tensor) -> Parts:
        groups, half = grouped(states, GROUP), 2 ** (self.bits - 1)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = (largest / -half).half()
        inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
        steps = (groups * inverse + half + 0.5).floor().clamp(0, 2 * half - 1)
        return {"values": pack_integers(steps.flatten(-2), self.bits), "scale": scale[..., 0]}

    def decode(self, parts: Parts, width: int) -> Tensor:
        steps = grouped(unpack_integers(parts["values"], self.bits, width), GROUP)
        return ((steps - 2 ** (self.bits - 1)) * parts["scale"].float().unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Ranged(Form):
    """Integers of `bits` bits from the least to the largest state of each group (q4_1)."""

    bits: int = 4
    group: int = GROUP
    stored: torch.dtype = torch.float16

    def encode(self, states: Tensor) -> Parts:
        groups, most = grouped(states, self.group), 2**self.bits - 1
        low = groups.amin(-1, keepdim=True).to(self.stored)
        step = ((groups.amax(-1, keepdim=True) - low.float()) / most).to(self.stored)
        steps = ((groups - low.float()) / step.float().clamp_min(TINY)).round().clamp(0, most).flatten(-2)
        return {"values": pack_integers(steps, self.bits), "low": low[..., 0], "step": step[..., 0]}

    def decode(self, parts: Parts, width: int) -> Tensor:
        steps = grouped(unpack_integers(parts["values"], self.bits, width), self.group)
        low, step = (parts[name].float().unsqueeze(-1) for name in ("low", "step"))
        return (steps * step + low).flatten(-2)


@dataclass(frozen=True)
class RangedChannels(Form):
    """`Ranged` of each channel of `step` tokens. The numbers of a channel are spread over its tokens."""

    bits: int
    step = GROUP

    def encode(self, states: Tensor) -> Parts:
        channels = states.unflatten(2, (-1, GROUP)).transpose(-1, -2)
        parts = Ranged(self.bits).encode(channels)
        return {name: part.flatten(3).unflatten(-1, (GROUP, -1)).flatten(2, 3) for name, part in parts.items()}

    def decode(self, parts: Parts, width: int) -> Tensor:
        channels = {
            name: part.unflatten(2, (-1, GROUP)).flatten(3).unflatten(-1, (width, -1)) for name, part in parts.items()
        }
        return Ranged(self.bits).decode(channels, GROUP).transpose(-1, -2).flatten(2, 3)


@dataclass(frozen=True)
class LloydMax(Form):
    """The nearest multiples of the 2^`bits` codes, with the scale for each token that has the least error."""

    bits: int

    def encode(self, states: Tensor) -> Parts:
        codes = lloyd_max(self.bits)
        size = states.square().mean(-1, keepdim=True).sqrt().clamp_min(TINY)
        places = torch.bucketize(states / size, (codes[1:] + codes[:-1]) / 2)
        found = codes[places]
        scale = (states * found).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True)
        return {"values": pack_integers(places, self.bits), "scale": scale.half()}

    def decode(self, parts: Parts, width: int) -> Tensor:
        places = unpack_integers(parts["values"], self.bits, width)
        return lloyd_max(self.bits)[places] * parts["scale"].float()


@dataclass(frozen=True)
class Rotated(Form):
    """States that are rotated by an orthogonal matrix before they are stored in a `form`."""

    form: Form
    rotation: Callable[[int], Tensor]

    def encode(self, states: Tensor) -> Parts:
        return self.form.encode(states @ self.rotation(states.shape[-1]))

    def decode(self, parts: Parts, width: int) -> Tensor:
        return self.form.decode(parts, width) @ self.rotation(width).T


@cache
def random_rotation(width: int) -> Tensor:
    """A random orthogonal matrix, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].float()


@cache
def lloyd_max(bits: int) -> Tensor:
    """The codes of a normal distribution with the least squared error, fp32 (2^bits,)."""
    places = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density, codes = (-places.square() / 2).exp(), torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(1000):
        nearest = torch.bucketize(places, (codes[1:] + codes[:-1]) / 2)
        totals = torch.zeros(2, 2**bits, dtype=torch.float64)
        totals.index_add_(1, nearest, torch.stack((places * density, density)))
        codes = totals[0] / totals[1]
    return codes.float()


def hadamard(width: int) -> Tensor:
    """The Hadamard rotation of a head."""
    return hadamard_on(width, torch.device("cpu"))


def grouped(states: Tensor, group: int) -> Tensor:
    """States, (..., width), as (..., groups, members); a group has at most the whole width."""
    return states.unflatten(-1, (-1, min(group, states.shape[-1])))


def pack_integers(numbers: Tensor, bits: int) -> Tensor:
    """Numbers from 0 to 2^bits - 1, (..., count), as uint8 (..., ceil(count bits / 8))."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    return pack_bits((numbers.to(torch.uint8).unsqueeze(-1) >> shifts & 1).bool().flatten(-2))


def unpack_integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_integers`: int32 (..., count)."""
    shifts = torch.arange(bits, dtype=torch.int32)
    return (unpack_bits(packed)[..., : count * bits].unflatten(-1, (count, bits)).int() << shifts).sum(-1).int()


class FormTokens(PackedTokens):
    """Packed tokens in a form."""

    def __init__(self, channels: Channels, layout: StatesLayout, form: Form) -> None:
        super().__init__(channels, layout)
        self.form = form

    def append(self, states: Tensor) -> None:
        self._write(self.form.encode(states.float()), states.shape[2])

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        first, step = start // self.form.step * self.form.step, self.form.step
        parts = {name: part[:, :, first : -(-stop // step) * step] for name, part in self.parts.items()}
        states = self.form.decode(parts, self.channels.shape[1])
        return states[:, :, start - first : stop - first].to(dtype)

    def native_states(self) -> None:
        return None


class SparKTokens(PackedTokens):
    """Tokens that keep the largest weighted channels, however the others are recovered."""

    def append(self, states: Tensor) -> None:
        self._write(encode(states, self.channels, self.layout, turns=0), states.shape[2])


class OtherLayer(PackedCacheLayer):
    """A layer with other packed keys and values, which are packed `step` tokens at a time."""

    def __init__(
        self,
        config: KVConfig,
        keys: Channels | None = None,
        values: Channels | None = None,
        exact_window: bool = False,
        *,
        tokens: tuple[Tokens, Tokens],
        step: int = 1,
    ) -> None:
        super().__init__(config, keys, values, exact_window)
        self.tokens, self.step = tokens, step

    def packed_count(self, count: int) -> int:
        return super().packed_count(count) // self.step * self.step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.packed is not None
        keys, values = (make(own.channels, own.layout) for make, own in zip(self.tokens, self.packed, strict=True))
        self.packed = keys, values


MakeLayer = Callable[..., PackedCacheLayer]


def layer_of(keys: Form, values: Form | None = None) -> MakeLayer:
    """A layer with keys and values in these forms, or both in the same."""
    values = values or keys
    tokens = partial(FormTokens, form=keys), partial(FormTokens, form=values)
    return partial(OtherLayer, tokens=tokens, step=max(keys.step, values.step))


SPARK: MakeLayer = partial(OtherLayer, tokens=(SparKTokens, SparKTokens))

QUANTISED: dict[str, tuple[str, MakeLayer]] = {
    "q4_0": ("4 bits", layer_of(Scaled())),
    "q4_0, Hadamard": ("4 bits", layer_of(Rotated(Scaled(), hadamard))),
    "q4_1, Hadamard": ("4 bits", layer_of(Rotated(Ranged(), hadamard))),
    "TurboQuant, 4 bits": ("4 bits", layer_of(Rotated(LloydMax(4), random_rotation))),
    "TurboQuant, 3 bits": ("3 bits", layer_of(Rotated(LloydMax(3), random_rotation))),
    "KIVI, 4 bits": ("4 bits", layer_of(RangedChannels(4), Ranged(4))),
    "KIVI, 2 bits": ("2 bits", layer_of(RangedChannels(2), Ranged(2))),
}
"""The type of values, and the layer, of each cache that keeps all channels."""
