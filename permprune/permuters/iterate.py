"""The loop that all iterative searches share: start or resume, run the rounds, and return the result."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, ClassVar

from permprune.losses.loss import Loss, LossFunction, TeacherOutputs, as_loss
from permprune.losses.objective import Objective
from permprune.permuters.base import TRAINING, CurvePoint, Permuter, Round, Run, Solution
from permprune.system.imports import on_first_use
from permprune.system.progress import bar, log

with on_first_use(globals()):
    from torch import Tensor

    from permprune.pruning.network import PrunedNetwork
    from permprune.system import distributed
    from permprune.system.search_state import State


class Search(ABC):
    """The state of an iterative search on a network, whose masks follow the current orders.

    `done` is the number of rounds (or steps, if a round has several) so far, and `best` the held-out loss of the best
    orders so far. `seconds` is the time of the start and of all rounds, including those of interrupted runs. `loss` is
    the objective, adapted to the data (`Loss.suited`). `curve` contains the recorded losses.
    """

    unit: ClassVar[str] = "round"

    def __init__(self, method: Iterative, network: PrunedNetwork, run: Run) -> None:
        self.name, self.network, self.run = method.name, network, run
        self.checkpoint = method.checkpoint(run)
        self.loss = as_loss(method.objective).suited(network.task, network.statistics.one_label_per_example)
        self.done, self.best, self.seconds = 0, float("inf"), 0.0
        self.curve: list[CurvePoint] = []
        self._since, self._timed = time.monotonic(), 0
        self.teacher_outputs: list[TeacherOutputs] | None = None

    @abstractmethod
    def start(self) -> None:
        """Set the initial orders, set `best` to their held-out loss, and record it."""

    @abstractmethod
    def step(self) -> int:
        """Run one round, increase `done`, and record the loss; returns the number of orders that changed."""

    @property
    def limit(self) -> float:
        """The seconds after which no other round begins."""
        minutes = self.run.minutes
        return float("inf") if minutes is None else 60 * minutes

    @property
    def midway(self) -> bool:
        """Whether the last round is to be continued, because an interrupted run saved a state within it."""
        return False

    def finish(self) -> None:  # noqa: B027
        """Do what follows the last round, unless a callback ended the search; by default nothing."""

    @abstractmethod
    def end(self) -> Solution:
        """Return the result."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state from which an interrupted search is resumed."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """Return the other values of the state as JSON values, without those that every search has."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore a state from the results of `tensors` and `values`."""

    def held_out_loss(self) -> float:
        """Return the loss of the network with its current weights on the held-out examples."""
        return self.network.loss(self.run.held_out, self.loss, self.teacher_outputs)

    def record(self, loss: float, kept: bool, stage: str = "search") -> None:
        """Add a point to the curve; `count_seconds` sets its time."""
        self.curve.append(CurvePoint(self.done, loss, kept, self.seconds, stage))

    def wait(self) -> None:
        """Leave out the time since it was last counted."""
        self._since, self._timed = time.monotonic(), len(self.curve)

    def count_seconds(self) -> None:
        """Add the time since the last call, or since `wait`, to `seconds` and to the points recorded since."""
        self.seconds += distributed.mean(time.monotonic() - self._since)
        self.curve[self._timed :] = [replace(point, seconds=self.seconds) for point in self.curve[self._timed :]]
        self.wait()

    def save(self) -> None:
        """Save the state from which an interrupted search is resumed."""
        self.count_seconds()
        curve = [astuple(point) for point in self.curve]
        values = {"done": self.done, "best": self.best, "seconds": self.seconds, "curve": curve}
        self.checkpoint.save(self.name, self.tensors(), {**values, "own": self.values()})
        if not self.midway:
            self.checkpoint.remove(self.name + TRAINING)


@dataclass(frozen=True)
class Iterative(Permuter):
    """A permuter that searches in rounds and saves its state after each.

    `objective` is the loss to minimise: an `Objective`, or a function of the model and a batch (`LossFunction`).
    """

    objective: Loss | LossFunction = Objective()

    def __post_init__(self) -> None:
        super().__post_init__()
        as_loss(self.objective)

    @property
    @abstractmethod
    def total(self) -> int:
        """The value of `Search.done` at which the search ends."""

    @abstractmethod
    def begin(self, network: PrunedNetwork, run: Run) -> Search:
        """Create a search on this network."""

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        search = self.begin(network, run)
        search.teacher_outputs = network.compute_teacher_outputs(run.held_out, search.loss)
        stopped = not self._resume(search) and self._notify(search, 0)
        with bar(self.name, self.total, search.done) as advance:
            while not stopped and (search.midway or (search.done < self.total and search.seconds <= search.limit)):
                search.wait()
                moved = search.step()
                search.save()
                advance(search.done, f"{self.name}: held-out loss {search.best:.4f}")
                stopped = self._notify(search, moved)
        if stopped:
            log.info("%s was stopped by a callback after %s %d", self.name, search.unit, search.done)
        else:
            search.wait()
            search.finish()
        return replace(search.end(), stopped=stopped)

    def _resume(self, search: Search) -> bool:
        """Resume from the state of an interrupted run if there is one, else start; returns whether it resumed."""
        saved: State | None = search.checkpoint.load(self.name)
        if saved is None:
            search.start()
            return False
        tensors, values = saved
        search.done, search.best, search.seconds = values["done"], values["best"], values["seconds"]
        search.curve = [CurvePoint(*point) for point in values["curve"]]
        search.restore(tensors, values["own"])
        log.info("%s resumes after %s %d", self.name, search.unit, search.done)
        return True

    def _notify(self, search: Search, moved: int) -> bool:
        """Call the callbacks with the last round; returns whether one of them requests to stop the search."""
        last, problems = search.curve[-1], len(search.network.problems)
        told = Round(
            method=self.name,
            number=search.done,
            total=self.total,
            loss=last.loss,
            best=search.best,
            kept=last.kept,
            moved=moved,
            problems=problems,
            seconds=search.seconds,
        )
        return search.run.notify(told)
