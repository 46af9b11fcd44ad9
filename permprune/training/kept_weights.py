"""The kept weights of a network in training: steps of Adam, what it remembers, and its way back if the loss rises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.kernels.adam.step import BETAS, adam_step, rate_at
from permprune.losses.objective import Loss
from permprune.pruning.network import PrunedNetwork
from permprune.system import distributed
from permprune.system.progress import log
from permprune.system.search_state import State
from permprune.system.shelf import Computed, Shelf
from permprune.training.second_moments import SecondMoments

WEIGHT, MEAN, SQUARES, GENERATOR = "weight/", "mean/", "squares/", "generator"
"""The prefixes of weights and of Adam's first and second moments, and the name of the generator's state, in a saved
training."""

LOGGED, FIRST = 10, 4
"""The number of steps whose mean loss is logged, and of the first ones, with whose loss it is compared."""

RISEN, ERRORS, SLOWER = 1.25, 3, 0.25
"""If the loss rises to so many times that of the first steps, and by so many standard errors, training goes back to its
first weights, with this share of the rate."""


@dataclass(frozen=True)
class Progress:
    """How far training is: the number of `steps`, and the `losses` of those since the last multiple of `LOGGED`.

    `first` is the mean loss of the first steps (`FIRST`). After the step `begun`, at a `place` of the schedule, it
    went back to its first weights, and has this `share` of the learning rate since.
    """

    steps: int = 0
    begun: int = 0
    place: float = 0.0
    share: float = 1.0
    first: float | None = None
    losses: tuple[float, ...] = ()

    def rate(self, place: float) -> float:
        """The learning rate at a place of the schedule, relative to the highest (`rate_at`)."""
        return self.share * rate_at((place - self.place) / (1 - self.place))


def has_risen(first: float, loss: float, spread: float) -> bool:
    """Whether the mean loss of `LOGGED` steps, with this standard deviation, is NaN or above that of the first ones."""
    error = spread * math.sqrt(1 / FIRST + 1 / LOGGED)
    return not loss - first <= max((RISEN - 1) * abs(first), ERRORS * error)


class KeptWeights:
    """The kept weights of a network in training with Adam, with moments of these weights only.

    Weights and first moments have the type in which the model holds each weight, and rest where those of the network do
    (`MaskedLayers.shelf`); second ones are factored (`SecondMoments`). `weights` are by layer, (rows, channels), with
    zeros where a weight is pruned, which do not rest. Learning rates are relative to the root mean square of a layer's
    kept weights, as in Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, section 8), because that differs more than
    tenfold between models, and the rates that suit them do as well. The `progress` is that of the steps so far.

    Starts from the weights that the network shows, or from the state of an interrupted training with the same masks.
    With `layers` only the weights of these are trained.
    """

    def __init__(
        self,
        network: PrunedNetwork,
        generator: torch.Generator,
        state: State | None,
        layers: Iterable[str] | None = None,
    ) -> None:
        tensors, values = state or ({}, {})
        self._network, self._generator, self.progress = network, generator, Progress(**values)
        self._names = list(network.layers if layers is None else layers)
        if state is not None:
            generator.set_state(tensors[GENERATOR])
        self._bits = network.bits
        self.weights, self._means = network.shelf.another(network.masks), network.shelf.another()
        self._squares: dict[str, SecondMoments] = {}
        self._scales: dict[str, float] = {}
        self._begin(tensors)

    def _begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights to those that the network shows, and moments to 0, or both to saved ones."""
        for name in self._names:
            layer = self._network.layers[name]
            weight = self._network.shown[name].to(layer.stored.dtype)
            mean = weight.new_zeros(len(weight), int(self._network.masks[name][0].sum()))
            self._scales[name] = float(weight.float().square().sum() / mean.numel()) ** 0.5
            if WEIGHT + name in tensors:
                weight.copy_(tensors[WEIGHT + name])
                mean.copy_(tensors[MEAN + name])
            self.weights[name], self._means[name] = weight, mean
            self._squares[name] = SecondMoments(self._bits[name], layer.shape[1], tensors.get(SQUARES + name))

    def follow(self, place: float) -> None:
        """After every `LOGGED` steps, log their mean loss; the last one was at this place of the schedule.

        If the loss has risen (`RISEN`), the rate is too high: training goes back to its first weights with a lower one.
        Losses that differ as much from step to step, as those of a few short answers, are no reason.
        """
        progress, losses = self.progress, torch.tensor(self.progress.losses, dtype=torch.float64)
        if len(losses) < LOGGED:
            return
        loss, spread = distributed.mean(float(losses.mean())), distributed.mean(float(losses.std()))
        log.info("training step %d, %.0f %% of the schedule: loss %.4f", progress.steps, 100 * place, loss)
        first = distributed.mean(float(losses[:FIRST].mean())) if progress.first is None else progress.first
        self.progress = progress = replace(progress, first=first if math.isfinite(first) else None, losses=())
        if not has_risen(first, loss, spread):
            return
        share = progress.share * SLOWER
        message = (
            "training: the loss rose from %.4f to %.4f: going back to the first weights, with %g of the learning rate"
        )
        log.warning(message, first, loss, share)
        self._network.set_weights(self._network.trained)
        self._begin({})
        self.progress = replace(progress, begun=progress.steps, place=place, share=share)

    def step(self, examples: Examples, loss: Loss, rate: float) -> float:
        """Take a step on the mean loss over `examples`, and return this rank's loss.

        A weight is updated as soon as its gradient is known.
        """
        self.progress = progress = replace(self.progress, steps=self.progress.steps + 1)
        seed, number = int(torch.randint(2**32, (), generator=self._generator)), itertools.count()

        def take(name: str, gradient: Tensor) -> None:
            weight, mean, gradient = self.weights[name], self._means[name], gradient.contiguous()
            taken = progress.steps - progress.begun
            adam_step(
                weight,
                gradient,
                self._bits[name],
                mean,
                self._squares[name].with_gradient(gradient, step=taken, beta=BETAS[1]),
                step=taken,
                rate=rate * self._scales[name],
                beta=BETAS[0],
                seed=(seed + next(number)) % 2**32,
            )
            self.weights[name], self._means[name] = weight, mean

        self._network.show(self.weights)
        mean_loss = self._network.take_gradients(examples, loss, take, kept=True, layers=self._names)
        self.progress = replace(progress, losses=(*progress.losses, mean_loss))
        return mean_loss

    def state(self) -> State:
        """Return the state after the last step, from which training can be resumed; its tensors are read one by one."""
        tensors: dict[str, Callable[[], Tensor]] = {GENERATOR: self._generator.get_state}
        tensors |= {WEIGHT + name: partial(self.weights.__getitem__, name) for name in self.weights}
        tensors |= {MEAN + name: partial(self._means.resting, name) for name in self._means}
        tensors |= {SQUARES + name: partial(getattr, moments, "means") for name, moments in self._squares.items()}
        return Computed(tensors, lambda name: tensors[name]()), asdict(self.progress)

    def with_pruned(self) -> Shelf:
        """Return the weights as stored, with the values that pruned ones had before; nothing is left for training."""
        whole = self._means = self._network.shelf.another()  # the moments are freed
        for name in self._names:
            mask, weight = self._network.masks[name], self.weights.pop(name)
            whole[name] = torch.where(mask, weight, self._network.weights[name].to(weight.dtype))
        return whole
