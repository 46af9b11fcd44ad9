"""Iterative searches as values: `init` returns a state, `step` the next one, until it is `done`.

The state is all that the rest of the search depends on. It is saved after each step as it is, so that a search that is
resumed continues as if it had not been interrupted.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from permprune.losses.objective import Loss, LossFunction, Objective, TeacherOutputs, as_loss
from permprune.permuters.base import CurvePoint, Permuter, Round, Run, Solution
from permprune.system.imports import on_first_use
from permprune.system.progress import bar, log, stage

with on_first_use(globals()):
    from torch import Tensor

    from permprune.pruning.gradients import Gradients
    from permprune.pruning.network import PrunedNetwork
    from permprune.system import distributed

TOLERANCE = 1e-4
"""The held-out loss must fall by more than this, in nats, for a round to be kept."""


@dataclass
class Landscape:
    """The loss of a pruned network on the data of a run, as a function of the orders and weights that it shows.

    `loss` is the objective of the search, adapted to the data (`Loss.suited`). `mean` may hold what can be computed
    again: a mean of gradients, and the orders that it belongs to.
    """

    network: PrunedNetwork
    run: Run
    loss: Loss
    mean: tuple[object, Gradients] | None = None

    @classmethod
    def of(cls, network: PrunedNetwork, run: Run, objective: Loss | LossFunction) -> Landscape:
        """Return the landscape of an objective, which is adapted to the network's task."""
        return cls(network, run, as_loss(objective).suited(network.task, network.statistics.one_label_per_example))

    @cached_property
    def teacher_outputs(self) -> list[TeacherOutputs] | None:
        """The dense model's outputs for the held-out examples, if the loss needs them."""
        return self.network.compute_teacher_outputs(self.run.held_out, self.loss)

    def held_out_loss(self) -> float:
        """Return the loss on the held-out examples."""
        return self.network.loss(self.run.held_out, self.loss, self.teacher_outputs)

    def better_of(self, orders: dict[str, Tensor], of: str) -> float:
        """Show these orders, found by the method `of`, or the natural ones if their held-out loss is lower.

        The network shows `orders` before. Returns the loss.
        """
        found = self.held_out_loss()
        self.network.set_orders(self.network.identity())
        natural = self.held_out_loss()
        if natural < found:
            log.info("natural order: loss %.4f, %.4f after %s", natural, found, of)
            return natural
        self.network.set_orders(orders)
        return found

    def gradients(self, number: int, examples: int, mean: Gradients | None = None) -> Gradients:
        """Return the gradients on batch `number` of so many examples, averaged with `mean`, which is overwritten."""
        return self.network.gradients(self.run.batch(number, examples), self.loss, mean)


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """The state of a search after a step.

    Attributes:
        orders: The best orders so far.
        best: Their loss on the held-out examples, the lowest so far.
        number: Rounds (or steps) made so far.
        moved: Number of orders that the last round changed.
        seconds: Seconds of the start and of all rounds so far, including those of interrupted runs.
        curve: The losses recorded so far.
    """

    orders: dict[str, Tensor]
    best: float
    number: int = 0
    moved: int = 0
    seconds: float = 0.0
    curve: tuple[CurvePoint, ...] = ()

    def record(self, loss: float, kept: bool, **changes: Any) -> Self:
        """Return this state with another point on the curve, and with other `changes`."""
        point = CurvePoint(self.number, loss, kept, self.seconds)
        return replace(self, curve=(*self.curve, point), **changes)

    def timed(self, change: Callable[[Self], Self]) -> Self:
        """Return the state that `change` makes of this one, with the seconds that it takes, at which new points end."""
        began = time.monotonic()
        state = change(self)
        seconds = state.seconds + distributed.mean(time.monotonic() - began)
        recorded = (replace(point, seconds=seconds) for point in state.curve[len(self.curve) :])
        return replace(state, seconds=seconds, curve=(*self.curve, *recorded))


S = TypeVar("S", bound=SearchState)


@dataclass(frozen=True)
class Iterative(Permuter, Generic[S]):
    """A permuter that searches in rounds and saves its state after each.

    `objective` is the loss to minimise: an `Objective`, or a function of the model and a batch (`LossFunction`).
    """

    unit: ClassVar[str] = "round"
    state: ClassVar[type[SearchState]] = SearchState
    """The type of its states."""

    objective: Loss | LossFunction = Objective()

    def __post_init__(self) -> None:
        super().__post_init__()
        as_loss(self.objective)

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of rounds (or steps) after which the search ends."""

    @property
    def stages(self) -> tuple[str, ...]:
        names = (f"{self.name}, start", f"{self.name}, {self.unit}s")
        return names if self.total else names[:1]

    @abstractmethod
    def init(self, landscape: Landscape) -> S:
        """Return the first state, with the loss of its orders on the curve."""

    @abstractmethod
    def step(self, landscape: Landscape, state: S) -> S:
        """Return the next state, with the loss of what was tried on the curve."""

    def done(self, landscape: Landscape, state: S) -> bool:
        """Whether no other step follows."""
        ended = state.number >= self.total or not landscape.network.problems
        return ended or state.seconds > landscape.run.seconds

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        """Search from the state that an interrupted run saved, or else from the start.

        Callbacks are called after each round and at the start; if one stops the search, its last state is the solution.
        """
        if not network.problems:
            log.warning("%s: there is no order to search for", self.name)
        landscape, checkpoint = Landscape.of(network, run, self.objective), self.checkpoint(run)
        state = cast(S | None, checkpoint.load_object(self.name, self.state))
        if state is not None:
            log.info("%s resumes after %s %d", self.name, self.unit, state.number)
            stopped = False
        else:
            state = self.init(landscape)
            stopped = run.notify(self._round(landscape, state))
        stage(self.stages[-1])
        with bar(self.name, self.total, state.number) as advance:
            while not stopped and not self.done(landscape, state):
                state = state.timed(partial(self.step, landscape))
                checkpoint.save_object(self.name, state)
                advance(state.number, f"{self.name}: held-out loss {state.best:.4f}")
                stopped = run.notify(self._round(landscape, state))
        if stopped:
            log.info("%s was stopped by a callback after %s %d", self.name, self.unit, state.number)
        return Solution(state.orders, state.seconds, state.curve, stopped=stopped)

    def _round(self, landscape: Landscape, state: S) -> Round:
        """What callbacks are given."""
        return Round(
            method=self.name,
            number=state.number,
            total=self.total,
            loss=state.curve[-1].loss,
            best=state.best,
            kept=state.curve[-1].kept,
            moved=state.moved,
            problems=len(landscape.network.problems),
            seconds=state.seconds,
        )
