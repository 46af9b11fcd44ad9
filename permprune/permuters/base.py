"""What every permuter answers, and what it is given."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from permprune.checkpoint import Checkpoint
from permprune.examples import Examples
from permprune.network import PrunedNetwork
from permprune.options import require_fields
from permprune.problem import Orders, Problem
from permprune.resources import release_freed_memory


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

    `weights` are those that the masks act on, by layer, if the search trained them.
    """

    orders: Orders
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """The budget and the data of a search.

    `train` and `held_out` are calibration examples, disjoint: gradients come from the first, the accept test reads the
    second. `minutes`, if given, ends a search after the round under way (its result then depends on the machine's
    speed). `worth` examples stand for one that permuters count: an image has one answer, a window of text hundreds.
    `solved` keeps what was found, so that a search that starts from another's orders does not repeat it.
    """

    train: Examples
    held_out: Examples
    seed: int = 0
    minutes: float | None = None
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None, {}))
    worth: int = 1
    solved: dict[Permuter, Solution] = field(default_factory=dict)

    def batch(self, number: int, count: int) -> Examples:
        """The `number`-th `count` of the training examples, over and over."""
        count *= self.worth
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

    def __post_init__(self) -> None:
        require_fields(self)

    def solve(self, network: PrunedNetwork, run: Run) -> Solution:
        """Search, or recall what this run already found, and make the network show it."""
        if self not in run.solved:
            network.set_weights({})
            release_freed_memory()  # calibration's, or that of the search before
            run.solved[self] = self.search(network, run)
        network.set_weights(run.solved[self].weights)
        network.set_orders(run.solved[self].orders)
        return run.solved[self]

    @abstractmethod
    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        """Find orders, whichever the network shows at first; its weights are the dense ones."""

    def checkpoint(self, run: Run, free: Sequence[str] = ()) -> Checkpoint:
        """Where the states of this search are kept: of its options only the `free` may change before it goes on."""
        options = {option: value for option, value in asdict(self).items() if option not in free}
        return Checkpoint(run.checkpoint.folder, {**run.checkpoint.settings, **options})


@dataclass(frozen=True)
class LocalPermuter(Permuter):
    """A permuter that can solve each problem by itself."""

    @abstractmethod
    def order(self, network: PrunedNetwork, problem: Problem, generator: torch.Generator) -> Tensor:
        """The order of one problem, int64 (size,)."""

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        started = time.monotonic()
        network.set_orders(network.identity())
        orders = network.each_problem(self.solver(network, run), self.name)
        return Solution(orders, time.monotonic() - started)

    def solver(self, network: PrunedNetwork, run: Run) -> Callable[[int, Problem], Tensor]:
        """`order`, given the number that seeds a problem and the problem."""
        return lambda number, problem: self.order(network, problem, run.generator(number))
