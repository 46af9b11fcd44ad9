"""The interface of permuters, with the input and the result of a search, and the two baselines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from permprune.options import described, require_fields
from permprune.pattern import Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.examples import Examples
    from permprune.pruning.masked import MaskedLayers
    from permprune.pruning.network import PrunedNetwork
    from permprune.pruning.problem import Problem
    from permprune.system import digests, distributed
    from permprune.system.memory import release_freed_memory
    from permprune.system.search_state import Checkpoint, Journal


@dataclass(frozen=True)
class CurvePoint:
    """One round of a search: its held-out loss, whether the round was kept, and the seconds of the search at its end.

    `stage` is "search", "update", the training of "blocks" one after the other, or "training" of all weights together.
    """

    round: int
    loss: float
    kept: bool
    seconds: float
    stage: str = "search"


@dataclass(frozen=True)
class Solution:
    """The result of a search, or of the recipe that it is a part of.

    `seconds` is the duration, including that of the permuter that a search starts from; `curve` has one point for each
    round. `weights` are the weights to be masked, by layer, if the recipe changed them, and `bits` the masks, if its
    update chose others than the scores do (`MaskedLayers.bits`). `stopped` is whether a callback ended the search.
    """

    orders: dict[str, Tensor]
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    bits: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False

    def show(self, network: PrunedNetwork) -> None:
        """Let the network run with this solution."""
        network.set_weights(self.weights)
        network.set_orders(self.orders)
        network.set_bits(self.bits)


@dataclass(frozen=True)
class Round:
    """The progress of a search, which callbacks receive after each round and before the first.

    Attributes:
        method: Name of the permuter.
        number: Rounds (or steps) made so far; 0 before the first.
        total: Largest number of rounds (or steps) of the search.
        loss: Held-out loss of the round's orders, in nats per term.
        best: The lowest held-out loss so far.
        kept: Whether the round's orders were kept.
        moved: Number of orders that the round changed.
        problems: Number of all orders.
        seconds: Seconds of the search so far, including those of interrupted runs.
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
"""Called after every round of a search; returning True stops the search, which keeps its best orders."""


@dataclass(frozen=True)
class Run:
    """The budget and the data of a search.

    Attributes:
        train: Calibration examples on which gradients are computed.
        held_out: Calibration examples for the accept test of each round; none of them is in `train`.
        seed: Seed of all random numbers.
        minutes: If given, a search ends with the round in which it exceeds this time. Its result then depends on the
            speed of the machine.
        callbacks: Called in this order after each round of an iterative search.
        checkpoint: Where searches save their states.
        examples_per_window: Number of examples that count as one: an image has one label, a window of text hundreds.
        passes: Passes over `train` of which the user knows: training warns of further ones.
        solved: Cache of solutions, so that a search that starts from another permuter's orders does not repeat that
            one. Different runs may share it, because a solution's key contains everything that it depends on.
    """

    train: Examples
    held_out: Examples
    seed: int = 0
    minutes: float | None = None
    callbacks: tuple[Callback, ...] = field(default=(), compare=False)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None, {}), compare=False)
    examples_per_window: int = 1
    passes: int = field(default=1, compare=False)
    solved: dict[tuple[object, ...], Solution] = field(default_factory=dict, compare=False)

    @property
    def seconds(self) -> float:
        """The time limit in seconds; infinite without one."""
        return math.inf if self.minutes is None else 60 * self.minutes

    @property
    def cache_key(self) -> tuple[object, ...]:
        """The fields of the run that the result of a search depends on; examples are compared by identity."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.compare)

    def notify(self, round: Round) -> bool:
        """Call the callbacks, on the first rank only; returns whether one of them returned True."""
        if not self.callbacks:
            return False
        return distributed.on_first(lambda: any([callback(round) is True for callback in self.callbacks]))

    def batch(self, number: int, count: int) -> Examples:
        """Return batch `number` of `count` training examples (times `examples_per_window`), in a cycle over all."""
        count *= self.examples_per_window
        return self.train[torch.arange(number * count, (number + 1) * count) % len(self.train)]

    def varied_batch(self, number: int, count: int) -> Examples:
        """Return `batch`, from the second pass on with texts cut at random (`Examples.cropped`).

        Targets that the dense model gives are as good for parts of a text, and training fits few texts too closely.
        """
        batch, again = self.batch(number, count), number * count * self.examples_per_window >= len(self.train)
        return batch.cropped(self.generator(number)) if again else batch

    def generator(self, *stream: int) -> torch.Generator:
        """Return a generator whose state depends only on the seed and on the numbers in `stream`."""
        mixed = self.seed
        for number in stream:
            mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Permuter(ABC):
    """Finds an order for each problem of a pruned network; the same network and run give the same orders.

    Raises `PermpruneError` for options out of range (see `permprune.options`).
    """

    name: ClassVar[str]

    free: ClassVar[tuple[str, ...]] = ()
    """Options that may change when an interrupted search is resumed, such as the number of rounds."""

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        """Find orders. The network may have any orders at first, and has the dense weights."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run that the search makes, in the words that are shown; the first begins with `solve`."""
        return (self.name,)

    @property
    def divides_rows(self) -> bool:
        """Whether it works where each process holds only some rows of the weights (`permprune.system.sharding`)."""
        return False

    @property
    def uses_fisher(self) -> bool:
        """Whether it reads the Fisher information of the calibration, which takes a backward pass."""
        return True

    def options(self) -> dict[str, Any]:
        """The permuter's options, as values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, plain) else described(value) for name, value in values.items()}

    def checkpoint(self, run: Run) -> Checkpoint:
        """The checkpoint for the states of this search; its settings are everything that the states depend on."""
        if run.checkpoint.folder is None:
            return run.checkpoint
        options = {name: value for name, value in self.options().items() if name not in self.free}
        examples = [run.checkpoint.settings.get(digests.CALIBRATION), run.train.digest, run.held_out.digest]
        searched = {"seed": run.seed, digests.CALIBRATION: examples, **options}
        return Checkpoint(run.checkpoint.folder, {**run.checkpoint.settings, **searched})

    def solve(self, network: PrunedNetwork, run: Run) -> Solution:
        """Return the solution, which the network then shows; it is looked up in `run.solved` first."""
        key = (self, network, *run.cache_key)
        if key not in run.solved:
            network.set_weights({})
            network.set_bits({})
            release_freed_memory()  # of the calibration or of the previous search
            run.solved[key] = self.search(network, run)
        run.solved[key].show(network)
        return run.solved[key]


class Scores(Protocol):
    """The scores that a problem's order is to keep; those of masked layers, or of anything else with channels.

    `scores` are (rows, channels), by the names in the problem's parts.
    """

    @property
    def scores(self) -> Mapping[str, Tensor]: ...

    def pattern_of(self, problem: Problem) -> Pattern:
        """The pattern along the channels of a problem."""

    def rows_of(self, problem: Problem) -> int:
        """The number of rows of scores that follow a problem's order."""


@dataclass(frozen=True)
class LocalPermuter(Permuter):
    """A permuter that solves each problem independently of the others."""

    @abstractmethod
    def order(self, network: MaskedLayers, problem: Problem, generator: torch.Generator) -> Tensor:
        """Return the order of one problem, int64 (size,)."""

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        network.set_orders(network.identity())
        with Journal(self.checkpoint(run), self.name) as journal:

            def solve(number: int, problem: Problem) -> Tensor:
                return self.order(network, problem, run.generator(number))

            return Solution(self.each(network, journal, solve), journal.seconds)

    def each(
        self, network: MaskedLayers, journal: Journal, solve: Callable[[int, Problem], Tensor]
    ) -> dict[str, Tensor]:
        """Return `solve(number, problem)` of every problem, by name; results in the journal are not computed again."""

        def find(number: int, problem: Problem) -> Tensor:
            if problem.name not in journal.tensors:
                journal.add({problem.name: solve(number, problem)})
            return journal.tensors[problem.name]

        return network.each_problem(find, self.name)


@dataclass(frozen=True)
class ScorePermuter(LocalPermuter):
    """A permuter that needs only scores: it orders the channels of a key/value cache as well as those of weights."""

    uses_fisher = False

    @abstractmethod
    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        """Return the order of one problem, int64 (size,)."""


@dataclass(frozen=True)
class Identity(ScorePermuter):
    """Keep the natural order."""

    name: ClassVar[str] = "none"
    divides_rows = True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return problem.identity()


@dataclass(frozen=True)
class Random(ScorePermuter):
    """Take a uniformly random order."""

    name: ClassVar[str] = "random"
    divides_rows = True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return torch.randperm(problem.size, generator=generator)
