"""What every permuter answers, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.options import described, require_fields
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.network import PrunedNetwork
from permprune.pruning.problem import Orders, Problem
from permprune.system import distributed
from permprune.system.digests import CALIBRATION
from permprune.system.memory import release_freed_memory
from permprune.system.progress import log
from permprune.system.search_state import Checkpoint, Journal

ORDER, WEIGHT = "order/", "weight/"
"""Prefixes of orders and of trained weights among the tensors of a kept solution."""


@dataclass(frozen=True)
class CurvePoint:
    """One round of a search: its held-out loss, whether the round was kept, and the seconds since the search began."""

    round: int
    loss: float
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Solution:
    """What a search found, the seconds it took (those of its start included) and the rounds it made.

    `weights` are those that the masks act on, by layer, if the search trained them. `stopped` tells whether a callback
    ended the search.
    """

    orders: Orders
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class Round:
    """What callbacks are told after each round of a search, and before the first.

    Attributes:
        method: Name of the permuter.
        number: Rounds (or steps) made so far; 0 before the first.
        total: Rounds (or steps) that the search makes at most.
        loss: Held-out loss of the round's orders, in nats per term.
        best: The least held-out loss so far.
        kept: Whether the round's orders were kept.
        moved: How many orders the round changed.
        problems: How many orders there are.
        seconds: Seconds since the search began, those of interrupted runs included.
    """

    method: str
    number: int
    total: int
    loss: float
    best: float
    kept: bool
    moved: int
    problems: int
    seconds: float


Callback = Callable[[Round], bool | None]
"""Told of every round of a search; returning True stops the search, which keeps its best orders."""


@dataclass(frozen=True)
class Run:
    """The budget and the data of a search.

    Attributes:
        train: Calibration examples from which gradients come.
        held_out: Calibration examples on which rounds are accepted, none of which is in `train`.
        seed: Seed of all that is drawn at random.
        minutes: If given, ends a search after the round under way; its result then depends on the machine's speed.
        callbacks: Called in turn after each round of an iterative search.
        checkpoint: Where searches keep their states.
        examples_per_window: Examples that count as one: an image has one label, a window of text hundreds.
        solved: What was found, so that a search that starts from another's orders does not repeat it; runs that differ
            may share it, since a solution is kept under all that it depends on.
    """

    train: Examples
    held_out: Examples
    seed: int = 0
    minutes: float | None = None
    callbacks: tuple[Callback, ...] = field(default=(), compare=False)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None, {}), compare=False)
    examples_per_window: int = 1
    solved: dict[tuple[object, ...], Solution] = field(default_factory=dict, compare=False)

    def decides(self) -> tuple[object, ...]:
        """All of a run that the result of a search depends on."""
        return tuple(getattr(self, own.name) for own in fields(self) if own.compare)

    def notify(self, round: Round) -> bool:
        """Call the callbacks, on the first rank; whether one of them returned True."""
        if not self.callbacks:
            return False
        return distributed.on_first(lambda: any([callback(round) is True for callback in self.callbacks]))

    def batch(self, number: int, count: int) -> Examples:
        """The `number`-th `count` of the training examples, over and over."""
        count *= self.examples_per_window
        return self.train[torch.arange(number * count, (number + 1) * count) % len(self.train)]

    def generator(self, *stream: int) -> torch.Generator:
        """A generator that depends on the seed and on the numbers of `stream` alone."""
        mixed = self.seed
        for number in stream:
            mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Permuter(ABC):
    """Finds an order for each problem of a pruned network; the same network, run and seed give the same orders.

    Raises `PermpruneError` for options out of range (see `permprune.options`).
    """

    name: ClassVar[str]

    free: ClassVar[tuple[str, ...]] = ()
    """Options that may change before an interrupted search goes on, such as for how long it does."""

    def __post_init__(self) -> None:
        require_fields(self)

    def solve(self, network: PrunedNetwork, run: Run) -> Solution:
        """Search, or recall what this run or an interrupted one already found, and make the network show it."""
        key = self.key(network, run)
        if key not in run.solved:
            network.set_weights({})
            run.solved[key] = self._recall(network, run) or self._search(network, run)
        solution = run.solved[key]
        network.set_weights(solution.weights)
        network.set_orders(solution.orders)
        return solution

    @abstractmethod
    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        """Find orders, whichever the network shows at first; its weights are the dense ones."""

    def key(self, network: PrunedNetwork, run: Run) -> tuple[object, ...]:
        """All that the solution depends on; networks and examples go by their identity."""
        return (self, network, *run.decides())

    def checkpoint(self, run: Run) -> Checkpoint:
        """Where the states of this search are kept, under all that they depend on."""
        if run.checkpoint.folder is None:
            return run.checkpoint
        options = {name: value for name, value in self.options().items() if name not in self.free}
        examples = [run.checkpoint.settings.get(CALIBRATION), run.train.digest, run.held_out.digest]
        own = {"seed": run.seed, CALIBRATION: examples, **options}
        return Checkpoint(run.checkpoint.folder, {**run.checkpoint.settings, **own})

    def options(self) -> dict[str, Any]:
        """Its options as JSON can hold them."""
        found = {own.name: getattr(self, own.name) for own in fields(self)}
        plain = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, plain) else described(value) for name, value in found.items()}

    def limits(self, run: Run) -> dict[str, Any]:
        """What ends the search: a solution found under others is not this one, but its state may be gone on from."""
        return {"minutes": run.minutes, **{name: self.options()[name] for name in self.free}}

    def state_bytes(self, network: PrunedNetwork) -> int:
        """About what the states of this search take on disk, while one is written beside the last."""
        return 2**20 + 64 * sum(problem.size for problem in network.problems)

    def _search(self, network: PrunedNetwork, run: Run) -> Solution:
        release_freed_memory()  # calibration's, or that of the search before
        solution = self.search(network, run)
        tensors = {ORDER + name: order for name, order in solution.orders.items()}
        tensors |= {WEIGHT + name: weight for name, weight in solution.weights.items()}
        curve = [[p.round, p.loss, p.kept, p.seconds] for p in solution.curve]
        values = {"limits": self.limits(run), "seconds": solution.seconds, "curve": curve}
        if not solution.stopped:
            self.checkpoint(run).save(f"{self.name}.found", tensors, values)
        return solution

    def _recall(self, network: PrunedNetwork, run: Run) -> Solution | None:
        """What an interrupted run found, if it ended by the same limits."""
        saved = self.checkpoint(run).load(f"{self.name}.found")
        if saved is None or saved[1]["limits"] != self.limits(run):
            return None
        tensors, values = saved
        log.info("%s was found by the interrupted run", self.name)
        orders, weights = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (ORDER, WEIGHT)
        )
        weights = {name: weight.to(network.dense[name]) for name, weight in weights.items()}
        return Solution(orders, values["seconds"], tuple(CurvePoint(*point) for point in values["curve"]), weights)


@dataclass(frozen=True)
class LocalPermuter(Permuter):
    """A permuter that can solve each problem by itself."""

    @abstractmethod
    def order(self, network: MaskedLayers, problem: Problem, generator: torch.Generator) -> Tensor:
        """The order of one problem, int64 (size,)."""

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        network.set_orders(network.identity())
        with Journal(self.checkpoint(run), self.name) as journal:
            return Solution(self.each(network, journal, self.solver(network, run)), journal.seconds)

    def each(
        self, network: MaskedLayers, journal: Journal, solve: Callable[[int, Problem], Tensor]
    ) -> dict[str, Tensor]:
        """What `solve` finds for every problem, given its number; what the journal knows is not sought again."""

        def find(number: int, problem: Problem) -> Tensor:
            if problem.name not in journal.tensors:
                journal.add({problem.name: solve(number, problem)})
            return journal.tensors[problem.name]

        return network.each_problem(find, self.name)

    def solver(self, network: MaskedLayers, run: Run) -> Callable[[int, Problem], Tensor]:
        """`order`, given the number that seeds a problem and the problem."""
        return lambda number, problem: self.order(network, problem, run.generator(number))

    def key(self, network: PrunedNetwork, run: Run) -> tuple[object, ...]:
        return super().key(network, replace(run, minutes=None))

    def limits(self, run: Run) -> dict[str, Any]:
        return super().limits(replace(run, minutes=None))
