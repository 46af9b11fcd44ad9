"""Training of the remaining weights of one block after the other, before all are trained together.

The weights of a block that are kept are trained on the distance of the block's outputs to those of the dense model's
block, from what the trained blocks before it compute (arXiv 2510.14444). A step takes passes through one block only, so
that many more are made in the same time than of training end to end, which then starts close to the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from permprune.examples import Examples, batches
from permprune.losses.objective import Loss, TeacherOutputs, relative_distance
from permprune.losses.targets import Task
from permprune.models.forward import frozen, padding_of, short_inputs
from permprune.models.hooks import continues, layers_up_to_each, resumed
from permprune.permuters.base import Run
from permprune.pruning.network import PrunedNetwork
from permprune.system import distributed
from permprune.system.progress import log, track
from permprune.system.search_state import Resumable, State
from permprune.system.shelf import Computed, Shelf
from permprune.training.kept_weights import KeptWeights
from permprune.training.train import place

RATE = 0.01
"""The highest learning rate, relative to the weights of a layer; chosen by ablation, see docs/results/ablations.md."""

PASSES = 2
"""About so many steps of a block are made on each window."""

Known = dict[nn.Module, Any]
"""What blocks compute of a batch, as `resumed` takes it."""


class BlockDistance(Loss):
    """The distance of a block's outputs to the dense model's, relative to their length; a batch is one term.

    The block is the last of `reached` (see `up_to_each`). `shown` has, for each window and each of its batches, what
    the blocks before it compute, and the outputs of the dense model's block, without padding. The batches that the loss
    is called with are those of the window that it was told to `show`, in turn.
    """

    def __init__(self, reached: Sequence[nn.Module], shown: Sequence[Sequence[tuple[Known, Tensor]]]) -> None:
        self.reached, self._shown = reached, shown
        self.show(0)

    def show(self, window: int) -> None:
        """Let the next batches be those of a window."""
        self._batches = iter(distributed.share(self._shown[window]))

    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        known, target = next(self._batches)
        outputs = dict(known)
        with resumed(self.reached, outputs):
            task(model, batch)
        return relative_distance([outputs_of(model, batch, outputs, self.reached[-1])], [target]), 1


def goes_on(network: PrunedNetwork, run: Run) -> bool:
    """Whether the model goes on from one block to the next (`continues`), else its blocks cannot be trained alone."""
    with frozen(network.model), network.autocast():
        going_on = continues(network.model, short_inputs(network.model, run.train))
    if not going_on:
        log.warning("the model does not go on from one block to the next: its blocks are not trained one by one")
    return going_on


def trained_blocks(network: PrunedNetwork, run: Run, steps: int, saved: Resumable, limit: float = math.inf) -> Shelf:
    """Return the weights by layer after the training of each block for so many steps; the network keeps its own.

    After `limit` seconds no other block is trained. Progress is saved in `saved` after each block.
    """
    before, blocks = network.trained, layers_up_to_each(network.model, network.layers.values())
    before.put_aside()
    weights, (tensors, values) = network.shelf.another(), saved.take() or ({}, {"blocks": 0})
    weights.update((name, network.weights[name].to(layer.stored.dtype)) for name, layer in network.layers.items())
    weights.update(tensors)
    network.set_weights(weights)
    count = max(1, min(len(run.train) // run.examples_per_window, round(steps / PASSES)))
    windows = run.batch(0, count).split(run.examples_per_window)
    pruned, dense = (Chain(network, windows) for _ in range(2))

    def state(done: int) -> State:
        names = [layer.name for _, layers in blocks[:done] for layer in layers]
        return Computed(names, weights.__getitem__), {"blocks": done}

    done = values["blocks"]
    for number, (reached, layers) in enumerate(track(blocks if done < len(blocks) else [], "training blocks")):
        if distributed.mean(saved.seconds) > limit:
            log.warning("blocks: no time is left: %d of %d were trained", done, len(blocks))
            break
        with network.dense_weights():
            dense.go_on(reached)
        if number >= done:
            shown = [list(zip(*each, strict=True)) for each in zip(pruned.outputs, dense.of(reached[-1]), strict=True)]
            names, loss = [layer.name for layer in layers], BlockDistance(reached, shown)
            train_block(network, run, steps, windows, loss=loss, names=names, weights=weights)
            network.set_weights(weights)
            done = number + 1
            saved.offer(partial(state, done))
        pruned.go_on(reached)
    saved.save(partial(state, done))
    network.set_weights(before)
    return weights


def train_block(
    network: PrunedNetwork,
    run: Run,
    steps: int,
    windows: Sequence[Examples],
    *,
    loss: BlockDistance,
    names: Sequence[str],
    weights: Shelf,
) -> None:
    """Train the layers of a block with these `names`, and put their weights among `weights` if its error has fallen."""
    number, errors = len(loss.reached), list[float]()
    kept, orders = KeptWeights(network, run.generator(number, steps), None, names), run.generator(number, steps, 1)
    while (at := place(steps, math.inf, len(errors), 0.0)) is not None:
        if len(errors) % len(windows) == 0:
            order = torch.randperm(len(windows), generator=orders).tolist()
        window = order[len(errors) % len(windows)]
        loss.show(window)
        errors.append(kept.step(windows[window], loss, RATE * kept.progress.rate(at)))
    half = len(errors) // 2
    if half and not distributed.mean(fmean(errors[-half:])) < distributed.mean(fmean(errors[:half])):
        log.warning("the error of the block of %s does not fall: its weights are as before", names[0])
        return
    weights.update(kept.with_pruned())


class Chain:
    """Passes of windows through a network from one block to the next.

    `outputs` are what the blocks so far compute, of each batch of each window.
    """

    def __init__(self, network: PrunedNetwork, windows: Sequence[Examples]) -> None:
        self._network = network
        self._batches = [batches(window, network.batch) for window in windows]
        self.outputs: list[list[Known]] = [[{} for _ in window] for window in self._batches]

    @torch.no_grad()
    def go_on(self, reached: Sequence[nn.Module]) -> None:
        """Run the last of these blocks (see `up_to_each`) with the weights that the network shows."""
        network = self._network
        with frozen(network.model), network.autocast():
            for batch, known in self._pairs():
                with resumed(reached, known):
                    network.task(network.model, batch)

    def of(self, block: nn.Module) -> list[list[Tensor]]:
        """Return what a block computes, without padding."""
        pairs = self._pairs()
        return [[outputs_of(self._network.model, *next(pairs), block) for _ in window] for window in self._batches]

    def _pairs(self) -> Iterator[tuple[Examples, Known]]:
        for window, known in zip(self._batches, self.outputs, strict=True):
            yield from ((batch.to(self._network.device), one) for batch, one in zip(window, known, strict=True))


def outputs_of(model: nn.Module, batch: Examples, outputs: Known, block: nn.Module) -> Tensor:
    """Return a block's outputs of a batch, (..., channels), without padding."""
    output = outputs[block]
    return padding_of(model, batch).real(output if isinstance(output, Tensor) else output[0], module=block)
