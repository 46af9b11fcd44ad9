"""The means of keys in few bits, and the bits of each head, chosen by the error of the output of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.attention.states import token_bytes
from permprune.kv import coding
from permprune.kv.attention import Plain, attend
from permprune.kv.calibration import SIDES, AttentionProbe, ObservedLayer
from permprune.kv.moving import Moving, still_mean
from permprune.kv.packing import Channels, StatesLayout, decode, encode
from permprune.matching.knapsack import cheapest
from permprune.system.progress import track

MEASURED = 4
"""The bits with which means of keys are compared."""

BYTES = 0.28
"""The default bytes of a packed token relative to 16-bit states."""


@dataclass(frozen=True, eq=False)
class BitErrors:
    """The errors of the output of attention of each head with each number of bits (`coding.BITS`).

    `means` are those of the keys of each layer. `errors` and `sizes`, in bytes of a token, have an entry for each head
    of the keys of a layer, then of its values, layer by layer. `whole` are the bytes of a token of all in 16 bits.
    """

    observed: Mapping[int, ObservedLayer]
    means: dict[int, Moving | None]
    errors: list[list[float]]
    sizes: list[list[int]]
    whole: int

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most bytes of a token, relative to 16 bits."""
        least, most = (sum(head[end] for head in self.sizes) / self.whole for end in (0, -1))
        return least, most

    @property
    def usual(self) -> float:
        """The default budget: `BYTES`, or in narrow heads, whose scales weigh more, that of 4 bits in every head."""
        four = sum(head[coding.BITS.index(MEASURED)] for head in self.sizes) / self.whole
        return max(BYTES, four)

    def channels(self, budget: float) -> dict[int, tuple[Channels, Channels]]:
        """Return the channels of all layers, whose heads have the bits with the least sum of the errors.

        `budget` is the number of bytes of a packed token relative to that of 16-bit states. Raises `PermpruneError` if
        it is too small or larger than can be used.
        """
        least, most = self.range
        if not least <= budget <= most:
            raise PermpruneError(
                f"a token takes {least:.3f} to {most:.3f} of 16 bits, and --bytes is {budget:g}: give a number between"
            )
        chosen = iter(cheapest(np.array(self.errors), np.array(self.sizes), int(budget * self.whole + 1e-6)))
        by_layer = {}
        for number, layer in sorted(self.observed.items()):
            keys, values = (torch.tensor([coding.BITS[next(chosen)] for _ in range(layer.heads)]) for _ in SIDES)
            by_layer[number] = layer.coded("keys", keys, self.means[number]), layer.coded("values", values)
        return by_layer


def measure_bits(observed: Mapping[int, ObservedLayer]) -> BitErrors:
    """Return the error of the output of attention with each number of bits of each head, keys and values apart.

    It is that on the probes of each layer, squared and relative to its output, with coded keys and whole values, and
    the other way round.
    """
    means: dict[int, Moving | None] = {}
    errors, sizes, whole = [], [], 0
    for number in track(sorted(observed), "choosing the bits of each head"):
        layer = observed[number]
        outputs = outputs_of(layer)
        energy = max(sum(float(output.square().sum()) for output in outputs), 1e-30)
        means[number] = choose_means(layer, outputs)
        for side in SIDES:
            width, moving = layer.width_of(side), means[number] if side == "keys" else None
            by_bits = [_errors(layer, side, bits, moving, outputs) / energy for bits in coding.BITS]
            errors += torch.stack(by_bits, 1).tolist()
            sizes += [[token_bytes(coding.TYPES[bits], width) for bits in coding.BITS]] * layer.heads
            whole += 2 * width * layer.heads
    return BitErrors(observed, means, errors, sizes, whole)


def choose_means(layer: ObservedLayer, outputs: list[Tensor]) -> Moving | None:
    """Return the means of the keys of each head with the least error of the output of attention; None without any.

    Tried are no mean, one that does not move, and one for each of the ways in which the model may turn keys.
    """
    if not layer.centres_keys:
        return None
    keys, _ = layer.states()
    tried = [still_mean(keys), *(rotary.mean_of(keys, torch.cat(layer.positions)) for rotary in layer.rotaries)]
    best, none = _errors(layer, "keys", MEASURED, None, outputs), torch.zeros_like(tried[0].mean)
    best_means, moves = Moving(none, none, none), False
    for moving in tried:
        error = _errors(layer, "keys", MEASURED, moving, outputs)
        best_means, moves = moving.where(error < best, best_means), moves or bool((error < best).any())
        best = torch.minimum(error, best)
    return best_means if moves else None


def outputs_of(layer: ObservedLayer) -> list[Tensor]:
    """Return the output of attention of each probe of a layer with whole states."""
    return [attend(probe.call, Plain(probe.keys, probe.values)) for probe in layer.probes]


def _errors(layer: ObservedLayer, side: str, bits: int, moving: Moving | None, outputs: list[Tensor]) -> Tensor:
    """Return the squared error of the output of attention of each key/value head, fp64 (heads,)."""
    channels = layer.coded(side, torch.full((layer.heads,), bits), moving)
    errors = torch.zeros(layer.heads, dtype=torch.float64)
    for probe, output in zip(layer.probes, outputs, strict=True):
        squares = (attend(probe.call, _coded(probe, side, channels, layer.skipped)) - output).square().double()
        errors += squares.sum((0, 2, 3)).view(layer.heads, -1).sum(1)
    return errors


def _coded(probe: AttentionProbe, side: str, channels: Channels, skipped: int) -> Plain:
    """Return the keys and values of a probe, those of one side as they are read when they were packed.

    The first `skipped` tokens and those of the probe's queries stay whole.
    """
    states: Tensor = getattr(probe, side)
    last = states.shape[2] - probe.call.query.shape[2]
    if last <= skipped:
        return Plain(probe.keys, probe.values)
    assert channels.bits is not None
    layout = StatesLayout(None, coding.TYPES[int(channels.bits[0])], signs=False)
    shown, mean = states[:, :, skipped:last], torch.zeros(())
    if channels.moving is not None:
        mean = channels.moving.at(torch.arange(skipped, last)[None])
    stored = encode(channels.arrange(shown - mean), channels, layout)
    read = channels.restore(decode(stored, channels, layout, states.dtype)) + mean
    coded = torch.cat((states[:, :, :skipped], read, states[:, :, last:]), 2)
    return Plain(coded, probe.values) if side == "keys" else Plain(probe.keys, coded)
