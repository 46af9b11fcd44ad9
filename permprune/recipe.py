"""A recipe: the order of the channels, the update of the weights that are kept, and their training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from permprune.permuters.base import Permuter
from permprune.permuters.iterate import TOLERANCE
from permprune.registry import describe, in_words
from permprune.system.imports import on_first_use
from permprune.system.progress import TRAIN, TRAIN_BLOCKS, UPDATE, log, stage
from permprune.training.train import Training
from permprune.updates.base import Update
from permprune.updates.methods import NoUpdate

with on_first_use(globals()):
    import torch

    from permprune.permuters.base import CurvePoint, Run, Solution
    from permprune.permuters.iterate import Landscape
    from permprune.pruning.network import PrunedNetwork
    from permprune.system import distributed
    from permprune.system.digests import digest_of
    from permprune.system.search_state import Resumable
    from permprune.training.blocks import goes_on, trained_blocks
    from permprune.training.train import train_weights
    from permprune.updates.base import weights_and_masks

WINDOWS = 32
"""The windows for the second moments of an update."""

TRAINED = 0.7
"""The share of a time limit that is left to the training."""


@dataclass(frozen=True)
class Recipe:
    """What a run does, in three parts, one after the other.

    `order` searches the order of the channels. `update` changes the weights that are kept to compensate for the others,
    and may choose other masks. `train` trains the weights that are kept, of each block and of all blocks together. Each
    change of the weights is kept only if it lowers the loss on the held-out examples.
    """

    order: Permuter
    update: Update
    train: Training

    @property
    def divides_rows(self) -> bool:
        """Whether it works where each process holds only some rows of the weights."""
        return self.order.divides_rows and not self.changes

    @property
    def lines(self) -> tuple[str, str, str]:
        """The parts as lines that a person reads, such as "order: newton, 6 rounds"."""
        parts = {"order": self.order, "update": self.update, "train": self.train}
        order, update, train = (f"{part}: {in_words(method)}" for part, method in parts.items())
        return order, update, train

    @property
    def rounds_share(self) -> float:
        """The share of a time limit in which the order is searched."""
        return 1 - TRAINED if self.train.steps else 1.0

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run that it makes, in the words that are shown; the first begins with `solve`."""
        return (*self.order.stages, *(change.stage for change in self.changes))

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes of the weights, in their order."""
        train = self.train
        asked = {
            Change(UPDATE, "update", describe(self.update)): not isinstance(self.update, NoUpdate),
            Change(TRAIN_BLOCKS, "blocks", str(train.block_steps)): train.block_steps > 0,
            Change(TRAIN, "training", describe(train)): train.steps > 0,
        }
        return tuple(change for change, wanted in asked.items() if wanted)

    def solve(self, network: PrunedNetwork, run: Run) -> Solution:
        """Return the result, which the network then shows; it is looked up in `run.solved` first."""
        key = (self, network, *run.cache_key)
        if key not in run.solved:
            minutes = run.minutes and run.minutes * self.rounds_share
            solution = self.order.solve(network, replace(run, minutes=minutes))
            if self.changes and not solution.stopped:
                solution = _Changes(self, network, run).of(solution)
            run.solved[key] = solution
        run.solved[key].show(network)
        return run.solved[key]


@dataclass(frozen=True)
class Change:
    """A change of the weights: the stage of the run, the name on the curve of the search, and what it depends on."""

    stage: str
    name: str
    method: str


class _Changes:
    """The changes of the weights in one run of a recipe, of which those are kept that lower the held-out loss."""

    def __init__(self, recipe: Recipe, network: PrunedNetwork, run: Run) -> None:
        self.recipe, self.network, self.run = recipe, network, run
        self.landscape = Landscape.of(network, run, recipe.train.objective)

    def of(self, found: Solution) -> Solution:
        """Return the solution with changed weights.

        Orders that were found without a loss are replaced by the natural ones if that is lower with these.
        """
        if found.curve:
            best = self.landscape.held_out_loss()
        else:
            best = self.landscape.better_of(found.orders, self.recipe.order.name)
            found = replace(found, orders=self.network.orders, curve=(CurvePoint(0, best, True, found.seconds),))
        solution = found
        for change in self.recipe.changes:
            if solution.seconds < self.run.seconds:
                solution, best = self.tried(change, solution, best)
            else:
                log.warning("%s: no time is left of the %g minutes", change.name, self.run.minutes)
        return solution

    def tried(self, change: Change, solution: Solution, best: float) -> tuple[Solution, float]:
        """Make a change of the solution with this loss; returns the better one of the two, which is shown."""
        stage(change.stage)
        train, key = self.recipe.train, self.key(change, solution)
        saved = Resumable(self.run.checkpoint, f"{self.recipe.order.name}.{change.name}", key)
        changed = self.made(change.name, solution, self.run.seconds - solution.seconds, saved)
        if changed is None:
            return solution, best
        changed.show(self.network)
        loss = self.landscape.held_out_loss()
        kept = loss < best - TOLERANCE
        log.info("%s: held-out loss %.4f, %s", change.name, loss, "kept" if kept else "rejected")
        if not kept and change.name == "training":
            log.warning(
                "training did not lower the held-out loss (%.4f): weights are as before; give a lower rate, as in "
                "--train steps=%d:rate=%g",
                *(best, train.steps, train.rate / 4),
            )
        seconds = solution.seconds + distributed.mean(saved.seconds)
        point = CurvePoint(solution.curve[-1].round, loss, kept, seconds, change.name)
        better = replace(changed if kept else solution, seconds=seconds, curve=(*solution.curve, point))
        better.show(self.network)
        return better, loss if kept else best

    def key(self, change: Change, solution: Solution) -> list[str]:
        """What the state of a change depends on, beside the settings of the run."""
        orders, data = digest_of(sorted(solution.orders.items())), (self.run.train.digest, self.run.held_out.digest)
        changes = self.recipe.changes
        return [orders, *data, *(before.method for before in changes[: changes.index(change) + 1])]

    def made(self, name: str, solution: Solution, limit: float, saved: Resumable) -> Solution | None:
        """Return the solution after a change, made in `limit` seconds; None if it cannot be made."""
        network, run, train = self.network, self.run, self.recipe.train
        if name == "update":
            with torch.no_grad(), network.shelf.room.without_reserved():
                self.recipe.update.run(network, run.batch(0, WINDOWS), saved=saved, limit=limit)
                weights, bits = weights_and_masks(network)
            return replace(solution, weights=weights, bits=bits)
        if name == "training":
            loss = self.landscape.loss.for_training(network.task)
            return replace(solution, weights=train_weights(network, run, train, loss, saved=saved, limit=limit))
        if not goes_on(network, run):
            return None
        return replace(solution, weights=trained_blocks(network, run, train.block_steps, saved, limit))
