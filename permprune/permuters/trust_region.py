"""Rounds of end-to-end search: gradient, proposal, accept test."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor

from permprune import parallel
from permprune.losses import Objective, Taught
from permprune.network import Gradients, PrunedNetwork
from permprune.permuters.base import CurvePoint, Permuter, Run, Solution
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.reconstruction import Reconstruction
from permprune.problem import Problem
from permprune.progress import console, log

TOLERANCE = 1e-4
"""Nats by which the held-out loss must fall for a round to count."""

MEMORY = "memory/"
"""Prefix of the proposals' memory among the tensors of a checkpoint."""


@dataclass
class State:
    """Where a search stands.

    `pending` are the rounds whose gradients are averaged at the present orders; `memory` is what the proposals of each
    problem carry from round to round.
    """

    round: int
    best: float
    damping: float
    pending: list[int]
    memory: dict[str, Tensor] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Proposal:
    """New order of a problem, the change of the loss that its model foretells, and what it carries on if kept."""

    order: Tensor
    change: float
    memory: Tensor | None


@dataclass(frozen=True)
class TrustRegion(Permuter):
    """Minimise the loss of the pruned network itself, over all orders at once.

    A round takes the gradient of the loss in every mask on `examples` fresh examples, asks `propose` for new orders
    under the quadratic model (see `quadratic`), and keeps them if the loss on held-out examples falls. All
    problems move together, which the block-diagonal model cannot see, so its curvature is multiplied by `damping`.
    When a proposal fails, a random half of its problems is tried, then a quarter; the damping rises when parts had to
    be left out and falls when the model foretold the loss well, or proposed nothing. Gradients taken at one point are
    averaged.

    `objective` is the loss, `start` finds the orders of the first round.
    """

    start: Permuter = Reconstruction()
    rounds: int = 12
    examples: int = 8
    damping: float = 15.0
    objective: Objective = Objective()

    @abstractmethod
    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Lower the model by moving channels.

        `memory` is what the problem's last kept proposal returned here; the return value takes its place.
        """

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        taught = network.teach(run.held_out, self.objective)
        state = self._resume(network, run) or self._begin(network, run, taught)
        mean: Gradients | None = None  # at the present orders
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(self.name, total=self.rounds, completed=state.round)
            while state.round < self.rounds and not (run.minutes and state.seconds > 60 * run.minutes):
                started = time.monotonic()
                mean = self._gradients(network, run, state, mean)
                mean = None if self._round(network, run, state, mean, taught) else mean
                state.seconds += parallel.mean(time.monotonic() - started)
                self._save(network, run, state)
                bar.update(task, advance=1, description=f"{self.name}: held-out loss {state.best:.4f}")
        return Solution(network.current(), state.seconds, tuple(state.curve))

    def _gradients(self, network: PrunedNetwork, run: Run, state: State, mean: Gradients | None) -> Gradients:
        """The mean gradient over this round's examples and those of the rounds refused at the same orders."""
        for number in state.pending if mean is None else []:  # resumed: take them again
            mean = _average(mean, network.gradients(run.batch(number, self.examples), self.objective))
        return _average(mean, network.gradients(run.batch(state.round, self.examples), self.objective))

    def _round(
        self, network: PrunedNetwork, run: Run, state: State, gradients: Gradients, taught: list[Taught] | None
    ) -> bool:
        before = network.current()
        proposals = network.each_problem(
            lambda number, problem: self._proposal(network, run, state, gradients, number, problem), self.name
        )
        shuffled = torch.randperm(len(network.problems), generator=run.generator(state.round, 1))
        names = [network.problems[i].name for i in shuffled]
        loss, share, kept = state.best, 1.0, False
        while not kept and share >= 0.25:
            moved = names[: max(1, round(share * len(names)))]
            network.set_orders({name: proposals[name].order if name in moved else before[name] for name in names})
            loss = network.loss(run.held_out, self.objective, taught)
            kept = loss < state.best - TOLERANCE
            share /= 2
        foretold = sum(proposals[name].change for name in moved)
        still = all(torch.equal(proposals[name].order, before[name]) for name in names)
        self._adapt(state, still, kept, share * 2, (loss - state.best) / min(-1e-12, foretold))
        if kept:
            state.best = loss
            state.memory |= {name: memory for name in moved if (memory := proposals[name].memory) is not None}
        else:
            network.set_orders(before)
        state.curve.append(CurvePoint(state.round, loss, kept, state.seconds))
        log.info(
            "%s round %d: held-out loss %.4f, %s; damping now %.1f",
            self.name,
            state.round,
            loss,
            f"kept {share * 2:.0%}" if kept else "refused",
            state.damping,
        )
        return kept

    def _proposal(
        self, network: PrunedNetwork, run: Run, state: State, gradients: Gradients, number: int, problem: Problem
    ) -> Proposal:
        model = QuadraticModel.of(network, problem, gradients.fisher, gradients.weight, state.damping)
        memory = self.propose(model, state.memory.get(problem.name), run.generator(state.round, 2, number))
        return Proposal(model.order, model.change, memory)

    @staticmethod
    def _adapt(state: State, still: bool, kept: bool, share: float, ratio: float) -> None:
        """`still` is whether nothing was proposed, `ratio` the true over the foretold change of the loss."""
        if still:
            state.damping /= 4
        elif kept and share == 1:
            state.damping *= 0.7 if ratio > 0.5 else 1.0 if ratio > 0.2 else 1.3
        else:
            state.damping *= 1.5
        state.pending = [] if kept else [*state.pending, state.round]
        state.round += 1

    def _begin(self, network: PrunedNetwork, run: Run, taught: list[Taught] | None) -> State:
        start = self.start.solve(network, run)
        state = State(0, network.loss(run.held_out, self.objective, taught), self.damping, [], seconds=start.seconds)
        state.curve.append(CurvePoint(0, state.best, True, state.seconds))
        return state

    def _resume(self, network: PrunedNetwork, run: Run) -> State | None:
        saved = run.checkpoint.load(self.name)
        if saved is None:
            return None
        tensors, values = saved
        network.set_orders(tensors)
        memory = {name.removeprefix(MEMORY): value for name, value in tensors.items() if name.startswith(MEMORY)}
        curve = [CurvePoint(*point) for point in values.pop("curve")]
        log.info("%s goes on after round %d", self.name, values["round"])
        return State(**values, memory=memory, curve=curve)

    def _save(self, network: PrunedNetwork, run: Run, state: State) -> None:
        memory = {MEMORY + name: value for name, value in state.memory.items()}
        values = {key: value for key, value in vars(state).items() if key not in ("memory", "curve")}
        values["curve"] = [[p.round, p.loss, p.kept, p.seconds] for p in state.curve]
        run.checkpoint.save(self.name, network.current() | memory, values)


def _average(mean: Gradients | None, new: Gradients) -> Gradients:
    """The mean of all gradients taken at one point; `mean.count` of them are in `mean`."""
    if mean is None:
        return new
    total = mean.count + new.count

    def mix(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: a[name].lerp(b[name], new.count / total) for name in a}

    return Gradients(mix(mean.weight, new.weight), mix(mean.fisher, new.fisher), new.loss, total)
