"""Training block by block: each block's kept weights on the distance of its outputs to those of the dense model.

After arXiv 2510.14444. The inputs of a block are what the trained blocks before it compute. For trainings.py.
"""

import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from permprune import Examples
from permprune.losses.objective import Loss, TeacherOutputs
from permprune.losses.targets import Task
from permprune.models.hooks import Done, attached
from permprune.models.layers import blocks
from permprune.permuters.base import Run
from permprune.permuters.tuning import KeptWeights, Progress, Schedule
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log

RATE = 0.01
"""The highest learning rate, relative to a layer's weights."""

PASSES = 2
"""About so many steps are taken on each window, one at a time."""

PASSED = 4
"""Windows that a block runs at a time where nothing is trained."""

SHORTEST = 1e-3
"""A position whose outputs are shorter than this share of the mean squared length counts as one of that length."""


def by_blocks(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Train the weights of each block, after those of the blocks before."""
    end, chain = time.process_time() + seconds, blocks(network.model)
    dense, given = first_inputs(network, run.train[:PASSED])
    began = time.process_time()
    with network.dense_weights():
        passed(network, chain[0], dense, given)
    each = len(chain) * (time.process_time() - began) / PASSED
    windows = min(len(run.train), round(seconds / each / (2 + 3 * PASSES)))  # a backward pass takes two forward
    dense, given = first_inputs(network, run.train[:windows])
    kept, shown = KeptWeights(network, run.generator(0), None), dense.clone()
    for number, block in enumerate(chain):
        began = time.process_time()
        budget = (end - began) / (len(chain) - number)
        with network.dense_weights():
            dense = passed(network, block, dense, given)
        passing = time.process_time() - began
        kept.progress = Progress()
        errors = train_block(kept, run, BlockLoss(block, given, shown, dense), clocked(budget - 2 * passing))
        shown = passed(network, block, shown, given)
        log.info("block %d of %d: %d steps, error %s", number, len(chain), len(errors), errors[-1:])
    network.set_weights(kept.with_pruned())


def train_block(kept: KeptWeights, run: Run, loss: "BlockLoss", schedule: Schedule) -> list[float]:
    """Train the weights of the loss's block; returns the errors of all steps."""
    errors: list[float] = []
    for begun in count():
        for window in torch.randperm(len(loss.inputs), generator=run.generator(begun)).tolist():
            loss.window = window
            if (place := schedule(len(errors), 0.0)) is None:
                return errors
            errors.append(kept.step(run.train[:1], loss, RATE * kept.progress.rate(place)))
    raise AssertionError


class BlockLoss(Loss):
    """The squared distance of a block's outputs to the targets, relative to the squared length of these.

    It is the mean over the positions of the `window`.
    """

    def __init__(self, block: nn.Module, given: Mapping[str, Any], inputs: Tensor, targets: Tensor) -> None:
        self.block, self.given, self.inputs, self.targets, self.window = block, given, inputs, targets, 0

    def __call__(
        self, model: nn.Module, batch: Examples, task: Task, teacher_outputs: TeacherOutputs | None
    ) -> tuple[Tensor, int]:
        outputs, expected = states_of(self.block, self.inputs[[self.window]], self.given), self.targets[[self.window]]
        length = expected.float().square().sum(-1)
        error = (outputs.float() - expected.float()).square().sum(-1)
        return (error / length.clamp_min(SHORTEST * length.mean())).mean(), 1


def clocked(seconds: float) -> Schedule:
    """The schedule of so many seconds of processor time from now."""
    began = time.process_time()

    def place(done: int, _: float) -> float | None:
        spent = time.process_time() - began
        each = spent / max(1, done)
        return (spent + each / 2) / seconds if spent + each < seconds else None

    return place


def states_of(block: nn.Module, inputs: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The outputs of a block."""
    found = block(inputs, **given)
    states: Tensor = found if isinstance(found, Tensor) else found[0]
    return states


@torch.no_grad()
def passed(network: PrunedNetwork, block: nn.Module, states: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The outputs of a block for all windows, bf16."""
    with network.autocast():
        return torch.cat([states_of(block, some, given).bfloat16() for some in states.split(PASSED)])


@torch.no_grad()
def first_inputs(network: PrunedNetwork, examples: Examples) -> tuple[Tensor, dict[str, Any]]:
    """What the first block reads: bf16 (windows, tokens, channels), and its other arguments."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def reach(_: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any]) -> None:
        found.append((args[0].bfloat16(), given))
        raise Done

    with attached([blocks(network.model)[0].register_forward_pre_hook(reach, with_kwargs=True)]):
        for number in range(len(examples)):
            try:
                with network.autocast():
                    network.task(network.model, examples[number : number + 1])
            except Done:
                pass
    return torch.cat([states for states, _ in found]), found[0][1]
