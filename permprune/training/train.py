"""Training of the weights that are kept, as the last part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.losses.objective import Loss, LossFunction, Objective, as_loss
from permprune.options import Natural, Positive, require_fields
from permprune.registry import method_of
from permprune.system.imports import on_first_use
from permprune.system.progress import bar, log

with on_first_use(globals()):
    from permprune.losses.targets import Imitation
    from permprune.permuters.base import Run
    from permprune.pruning.network import PrunedNetwork
    from permprune.system import distributed
    from permprune.system.search_state import Resumable
    from permprune.system.shelf import Shelf
    from permprune.training.kept_weights import KeptWeights

WINDOWS = 2
"""The windows of a step."""

STEPS_OF_BLOCKS = 2
"""The steps of each block for one of all weights together: they take as long."""


@dataclass(frozen=True)
class Training:
    """Train the weights that are kept with Adam, at the order and the masks that were found.

    `steps` steps of two windows each lower the task's loss and the KL divergence from the dense model (`objective`, see
    `Objective.for_training`). The learning rate rises to `rate`, relative to the weights of a layer, and falls to 0.
    With `blocks`, the weights of each block are trained before, one block after the other, on the distance of its
    outputs to the dense model's, in twice as many steps. Without steps there is no training.
    """

    name: ClassVar[str] = ""
    steps: Natural = 0
    blocks: bool = False
    rate: Positive = 2e-3
    objective: Loss | LossFunction = Objective()

    def __post_init__(self) -> None:
        require_fields(self)
        as_loss(self.objective)

    @property
    def block_steps(self) -> int:
        """The steps of each block."""
        return STEPS_OF_BLOCKS * self.steps if self.blocks else 0


def training(given: str | Training) -> Training:
    """Return the training of options such as "steps=60:blocks=true", or "none"; an object as it is (`method_of`)."""
    if isinstance(given, str):
        given = "" if given == "none" else f":{given}"
    return method_of(given, Training, {"": Training})


def place(steps: int, limit: float, done: int, spent: float) -> float | None:
    """Return the place of the next step in a training, from 0 to 1; None at its end.

    It ends after so many `steps`, and before a step that would exceed the `limit` in seconds; steps are assumed to take
    as long as the `done` ones, which took `spent` seconds. The end that is nearer counts.
    """
    each = spent / max(1, done)
    if done >= steps or spent + each >= limit:
        return None
    return max((done + 0.5) / steps, (spent + each / 2) / limit)


def train_weights(
    network: PrunedNetwork, run: Run, method: Training, loss: Loss, *, saved: Resumable, limit: float
) -> Shelf:
    """Train the network's weights with Adam at its current masks; returns them by layer.

    The network itself keeps its weights. Step i uses batch i of the training examples. Training ends after the steps of
    the method or `limit` seconds. Pruned weights do not change. The state is offered to `saved` after each step and
    saved at the end; training continues from the state found there.
    """
    before = network.trained
    before.put_aside()
    kept = KeptWeights(network, run.generator(0, WINDOWS), saved.take())
    if kept.progress.steps:
        log.info("training resumes after step %d", kept.progress.steps)
    windows = len(run.train) // run.examples_per_window
    batch_of = run.varied_batch if isinstance(network.task, Imitation) else run.batch
    with bar("training, % of the schedule", 100) as advance:
        while True:
            steps = kept.progress.steps
            spent = distributed.mean(saved.seconds if steps else 0.0)
            if (at := place(method.steps, limit, steps, spent)) is None:
                break
            if run.passes * windows // WINDOWS == steps:
                log.warning(
                    "training starts over after %d windows, which it fits better than other data from here on: "
                    "give more calibration data, or a larger --samples",
                    windows,
                )
            mean_loss = kept.step(batch_of(steps, WINDOWS), loss, method.rate * kept.progress.rate(at))
            advance(round(100 * at), f"training: loss {mean_loss:.4f}, % of the schedule")
            kept.follow(at)
            saved.offer(kept.state)
    saved.save(kept.state)
    weights = kept.with_pruned()
    network.set_weights(before)
    return weights
