"""Training of the remaining weights between the rounds of a search, or after them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.kernels.adam.step import adam_step
from permprune.losses.objective import Loss
from permprune.losses.targets import Imitation
from permprune.permuters.base import Run
from permprune.permuters.iterate import TOLERANCE, Landscape, S
from permprune.pruning.network import PrunedNetwork
from permprune.system import distributed
from permprune.system.progress import bar, log
from permprune.system.search_state import Resumable, State
from permprune.system.shelf import Computed, Shelf
from permprune.training.int4 import SOLVED, Int4Weights

BETAS = (0.9, 0.95)
"""Adam's betas; the second is that of language models, which suits a small number of steps."""

RISING = 0.1
"""The share of the steps in which the learning rate rises from 0."""

WEIGHT, MOMENTS, SCALE, GENERATOR = "weight/", "moments/", "scale/", "generator"
"""The prefixes of weights, Adam's moments and scales of int4, and the name of the generator's state, in a saved
training."""

LOGGED = 10
"""The number of steps whose mean loss is logged."""

Schedule = Callable[[int, float], float | None]
"""The place in a schedule, from 0 to 1, of the step that follows so many steps and seconds; None at the end."""


def counted(steps: int) -> Schedule:
    """Return the schedule of a number of steps: the place of each is its middle."""
    return lambda done, _: (done + 0.5) / steps if done < steps else None


def timed(seconds: float) -> Schedule:
    """Return a schedule of `seconds` seconds, which ends before a step that would exceed them.

    Steps are assumed to take as long as those before them did on average.
    """

    def place(done: int, spent: float) -> float | None:
        each = spent / max(1, done)
        return (spent + each / 2) / seconds if spent + each < seconds else None

    return place


def first_ended(*schedules: Schedule) -> Schedule:
    """Return the schedule that is at the furthest place of several, and ends with the first of them."""

    def place(done: int, spent: float) -> float | None:
        places = [schedule(done, spent) for schedule in schedules]
        return None if None in places else max(filter(None, places), default=0.0)

    return place


class KeptWeights:
    """The kept weights of a network in training with Adam, with moments of these weights only.

    Weights and moments have the type in which the model holds each weight, and rest where those of the network do
    (`MaskedLayers.shelf`). `weights` are by layer, (rows, channels), with zeros where a weight is pruned, which do not
    rest. Learning rates are relative to the root mean square of a layer's kept weights, as in Adafactor (Shazeer &
    Stern 2018, arXiv 1804.04235, section 8), because that differs more than tenfold between models, and the rates that
    suit them do as well. `steps` is the number of steps so far.

    Starts from the weights that the network shows, or from the state of an interrupted training with the same masks.
    """

    def __init__(self, network: PrunedNetwork, generator: torch.Generator, state: State | None) -> None:
        tensors, values = state or ({}, {"steps": 0})
        self._network, self._generator, self.steps = network, generator, int(values["steps"])
        if state is not None:
            generator.set_state(tensors[GENERATOR])
        self._bits = network.bits
        self.weights, self._moments = network.shelf.another(network.masks), network.shelf.another()
        scales = [name.removeprefix(SCALE) for name in tensors if name.startswith(SCALE)]
        self._int4 = Int4Weights(network, {name: tensors[SCALE + name] for name in scales})
        self._scales: dict[str, float] = {}
        for name, layer in network.layers.items():
            weight = network.shown[name].to(layer.stored.dtype)
            kept = int(network.masks[name][0].sum())
            moments = weight.new_zeros(2, len(weight), kept)
            self._scales[name] = float(weight.float().square().sum() / (len(weight) * kept)) ** 0.5
            if state is not None:
                weight.copy_(tensors[WEIGHT + name])
                moments.copy_(tensors[MOMENTS + name])
            self.weights[name], self._moments[name] = weight, moments

    def begin_int4(self, examples: Examples) -> None:
        """Let the next steps run with the weights as int4 stores them, solved on `examples`, if they do not yet."""
        if not self._int4.scales:
            self._int4.begin(self.weights, examples)

    def step(self, examples: Examples, loss: Loss, rate: float) -> float:
        """Take a step on the mean loss over `examples`, and return this rank's loss.

        A weight is updated as soon as its gradient is known.
        """
        self.steps += 1
        seed, number = int(torch.randint(2**32, (), generator=self._generator)), itertools.count()

        def take(name: str, gradient: Tensor) -> None:
            weight, moments = self.weights[name], self._moments[name]
            adam_step(
                weight,
                gradient.contiguous(),
                self._bits[name],
                *moments,
                step=self.steps,
                rate=rate * self._scales[name],
                betas=BETAS,
                seed=(seed + next(number)) % 2**32,
            )
            self.weights[name], self._moments[name] = weight, moments

        shown = self.weights
        if self._int4.scales:
            shown = self._network.shelf.another()
            shown.update((name, self._int4.stored(name, weight)) for name, weight in self.weights.items())
        self._network.show(shown)
        return self._network.take_gradients(examples, loss, take, kept=True)

    def state(self) -> State:
        """Return the state after the last step, from which training can be resumed; its tensors are read one by one."""
        tensors: dict[str, Callable[[], Tensor]] = {GENERATOR: self._generator.get_state}
        tensors |= {WEIGHT + name: partial(self.weights.__getitem__, name) for name in self.weights}
        tensors |= {MOMENTS + name: partial(self._moments.resting, name) for name in self._moments}
        tensors |= {SCALE + name: partial(self._int4.scales.__getitem__, name) for name in self._int4.scales}
        return Computed(tensors, lambda name: tensors[name]()), {"steps": self.steps}

    def with_pruned(self) -> Shelf:
        """Return the weights as stored, with the values that pruned ones had before; nothing is left for training."""
        whole = self._moments = self._network.shelf.another()  # the moments are freed
        for name in self._network.layers:
            mask, weight = self._network.masks[name], self._int4.stored(name, self.weights.pop(name))
            whole[name] = torch.where(mask, weight, self._network.weights[name].to(weight.dtype))
        return whole


def train_further(
    landscape: Landscape,
    state: S,
    schedule: Schedule,
    *,
    first: int,
    examples: int,
    rate: float,
    int4: float,
    saved: Resumable,
) -> tuple[S, bool]:
    """Train the weights of a state (see `train_weights`), and keep them if the held-out loss falls.

    Returns the state, with the loss of the trained weights on the curve, and whether they were kept. The network shows
    the state.
    """
    network, loss = landscape.network, landscape.loss.for_training(landscape.network.task)
    state = replace(state, seconds=state.seconds + saved.before)
    weights = train_weights(
        network, landscape.run, loss, schedule, first=first, examples=examples, rate=rate, int4=int4, saved=saved
    )
    network.set_weights(weights)
    held_out = landscape.held_out_loss()
    kept = held_out < state.best - TOLERANCE
    state = state.record(held_out, kept, "training")
    if kept:
        return replace(state, best=held_out, weights=weights), True
    network.set_weights(state.weights)
    return state, False


def train_weights(
    network: PrunedNetwork,
    run: Run,
    loss: Loss,
    schedule: Schedule,
    *,
    first: int,
    examples: int,
    rate: float,
    int4: float = 0.0,
    saved: Resumable,
) -> Shelf:
    """Train the network's weights with Adam at its current masks, as long as `schedule` does; returns them by layer.

    The network itself keeps its weights. Step i uses batch `first` + i of `examples` training examples, at a learning
    rate that rises to `rate` and falls to 0 as the places rise from 0 to 1 (`counted`, `timed`); it is relative to the
    weights of a layer (see `KeptWeights`). Pruned weights do not change. Adam's moments start from 0 in each call. The
    state is offered to `saved` after each step and saved at the end; training continues from the state found there.

    In the last share `int4` of the schedule the network runs with its weights as int4 stores them (`training.int4`),
    and these are returned.
    """
    before = network.trained
    before.put_aside()
    kept = KeptWeights(network, run.generator(first, examples), saved.take())
    if kept.steps:
        log.info("training resumes after step %d", kept.steps)
    windows = len(run.train) // run.examples_per_window
    batch_of = run.varied_batch if isinstance(network.task, Imitation) else run.batch
    losses: list[float] = []
    with bar("training, % of the schedule", 100) as advance:
        while (place := schedule(kept.steps, distributed.mean(saved.seconds if kept.steps else 0.0))) is not None:
            if run.passes * windows // examples == first + kept.steps:
                log.warning(
                    "training starts over after %d windows, which it fits better than other data from here on: "
                    "give more calibration data, or a larger --samples",
                    windows,
                )
            if place > 1 - int4:
                kept.begin_int4(run.batch(0, SOLVED))
            scheduled = rate * min(place / RISING, (1 - place) / (1 - RISING))
            losses.append(kept.step(batch_of(first + kept.steps, examples), loss, scheduled))
            advance(round(100 * place), f"training: loss {losses[-1]:.4f}, % of the schedule")
            saved.offer(kept.state)
            if len(losses) == LOGGED:
                log.info("training step %d, %.0f %% of the schedule: loss %.4f", kept.steps, 100 * place, fmean(losses))
                losses.clear()
    saved.save(kept.state)
    weights = kept.with_pruned()
    network.set_weights(before)
    return weights
