"""Rounds of end-to-end search: gradient, proposal, accept test."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

import torch
from rich.progress import Progress
from torch import Tensor

from permprune.losses.objective import Objective, TeacherOutputs
from permprune.options import Count, Natural, Positive
from permprune.permuters.base import WEIGHT, CurvePoint, Permuter, Run, Solution
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.tuning import tuned
from permprune.pruning.network import Gradients, PrunedNetwork
from permprune.pruning.problem import Orders, Problem
from permprune.system import distributed
from permprune.system.progress import console, log

TOLERANCE = 1e-4
"""Nats by which the held-out loss must fall for a round to count."""

STILL = 1e-3
"""A problem whose foretold change is below this share of the mean one proposes nothing."""

ATTEMPTS = 4
"""How often a step is corrected, and how many parts of it are tried before a round is refused."""

FAR = 0.1
"""The least share of a step, and of the problems, that is worth trying."""

MEMORY, PREVIOUS = "memory/", "previous/"
"""Prefixes, among the tensors of a checkpoint, of the proposals' memory and of the orders before the last step."""


@dataclass
class State:
    """Where a search stands.

    `damping` is that of each problem's model, `rate` that of training. `previous` are the orders before the last step,
    if it was kept, and `slopes` what its gradient said along it, by problem; `pending` the rounds whose gradients are
    averaged at the present orders, if it was not. `memory` is what the proposals of each problem carry from round to
    round.
    """

    round: int
    best: float
    damping: dict[str, float]
    rate: float
    pending: list[int] = field(default_factory=list)
    previous: Orders = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)
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
    under the quadratic model (see `quadratic`), and keeps them if the loss on held-out examples falls. If it does not,
    the same is tried with a random part of the problems, at first as large as the parabola through the slope and the
    loss of the whole step advises. Gradients taken at one point are averaged.

    All problems move together, which the block-diagonal model cannot see, so its curvature is multiplied by a damping,
    one for each problem. It begins at `damping` and follows what a step brought (see `_adapt`), and the slope that the
    next gradient finds at the step's end: a problem that should go back overshot, one that should go on was timid. A
    step that went much too far is corrected so at once, and taken again (see `_step`).

    `objective` is the loss, `suited` to the data; `start` finds the orders of the first round, if they are better than
    the natural ones.

    With `tune` order and weights are optimised jointly: after each round but the first `wait` the weights that stay are
    trained for so many steps (see `tuned`) of half as many examples, on the objective and the KL divergence from the
    dense model, at `rate`, which is halved when the held-out loss does not fall. The weights that are pruned meanwhile
    rest as they were, for an order that takes them back.
    """

    free: ClassVar[tuple[str, ...]] = ("rounds",)
    start: Permuter = Reconstruction(swaps=3, candidates=1)
    rounds: Natural = 16
    examples: Count = 8
    damping: Positive = 15.0
    objective: Objective = Objective()
    tune: Natural = 0
    wait: Natural = 0
    rate: Positive = 1e-4

    @abstractmethod
    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Lower the model by moving channels.

        `memory` is what the problem's last kept proposal returned here; the return value takes its place.
        """

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        objective = self.objective.suited(network.task, network.statistics.one_label_per_example)
        return replace(self, objective=objective)._minimise(network, run)

    def state_bytes(self, network: PrunedNetwork) -> int:
        weights = sum(weight.numel() for weight in network.dense.values()) if self.tune else 0
        return super().state_bytes(network) + 12 * weights  # twice the state, and the solution

    def _minimise(self, network: PrunedNetwork, run: Run) -> Solution:
        teacher_outputs = network.compute_teacher_outputs(run.held_out, self.objective)
        state = self._resume(network, run) or self._begin(network, run, teacher_outputs)
        mean: Gradients | None = None  # at the present orders
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(self.name, total=self.rounds, completed=state.round)
            while state.round < self.rounds and not (run.minutes and state.seconds > 60 * run.minutes):
                started = time.monotonic()
                mean = self._gradients(network, run, state, mean)
                mean = None if self._round(network, run, state, mean, teacher_outputs) else mean
                if self.tune and state.round > self.wait and self._tune(network, run, state, teacher_outputs):
                    mean = None
                state.seconds += distributed.mean(time.monotonic() - started)
                self._save(network, run, state)
                bar.update(task, advance=1, description=f"{self.name}: held-out loss {state.best:.4f}")
        trained = network.weights if self.tune else {}
        return Solution(network.current(), state.seconds, tuple(state.curve), trained)

    def _gradients(self, network: PrunedNetwork, run: Run, state: State, mean: Gradients | None) -> Gradients:
        """The mean gradient over this round's examples and those of the rounds refused at the same orders."""
        for number in state.pending if mean is None else []:  # resumed: take them again
            mean = _average(mean, network.gradients(run.batch(number, self.examples), self.objective))
        return _average(mean, network.gradients(run.batch(state.round, self.examples), self.objective))

    def _round(
        self,
        network: PrunedNetwork,
        run: Run,
        state: State,
        gradients: Gradients,
        teacher_outputs: list[TeacherOutputs] | None,
    ) -> bool:
        before = network.current()
        self._judge(network, state, before, gradients)
        proposals, slopes, loss = self._step(network, run, state, gradients, teacher_outputs)
        loss, moved = self._parts(network, run, state, before, proposals, (sum(slopes.values()), loss), teacher_outputs)
        kept = loss < state.best - TOLERANCE
        self._adapt(state, proposals, moved, kept, loss - state.best)
        state.pending = [] if kept else [*state.pending, state.round]
        state.previous = before if kept else {}
        state.slopes = {name: slopes[name] for name in moved} if kept else {}
        if kept:
            state.best = loss
            state.memory |= {name: memory for name in moved if (memory := proposals[name].memory) is not None}
        else:
            network.set_orders(before)
        state.curve.append(CurvePoint(state.round, loss, kept, state.seconds))
        result = f"{len(moved)} of {len(proposals)} orders moved" if kept else "refused"
        typical = median(state.damping.values())
        log.info(
            "%s round %d: held-out loss %.4f, %s; median damping %.1f", self.name, state.round, loss, result, typical
        )
        state.round += 1
        return kept

    def _tune(
        self, network: PrunedNetwork, run: Run, state: State, teacher_outputs: list[TeacherOutputs] | None
    ) -> bool:
        """Train the weights that stay, and keep them if the held-out loss falls; says whether."""
        before, first = network.weights, (state.round - 1) * self.tune
        objective = replace(self.objective, divergence=1.0)
        trained = tuned(network, run, first, self.tune, max(1, self.examples // 2), state.rate, objective)
        network.set_weights(trained)
        loss = network.loss(run.held_out, self.objective, teacher_outputs)
        kept = loss < state.best - TOLERANCE
        if kept:
            state.best, state.pending, state.previous, state.slopes = loss, [], {}, {}
        else:
            network.set_weights(before)
            state.rate /= 2
        state.curve.append(CurvePoint(state.round, loss, kept, state.seconds))
        result = "kept" if kept else "refused"
        log.info("%s: held-out loss %.4f after %d steps of training, %s", self.name, loss, self.tune, result)
        return kept

    def _judge(self, network: PrunedNetwork, state: State, here: Orders, gradients: Gradients) -> None:
        """Let the slope at the end of the last step, beside that at its beginning, decide on each problem's damping.

        Along a parabola that falls with slope s and ends with slope r * s the step was 1 / (1 - r) times too short; the
        damping takes half of that, in logarithm, since the slope is a noisy one.
        """
        ends = _slopes(network, state.previous, here, gradients) if state.previous else {}
        for name, start in state.slopes.items():
            if start < -TOLERANCE / 10:
                state.damping[name] *= min(2.0, max(0.5, max(0.0, 1 - ends[name] / start) ** 0.5))

    def _proposals(self, network: PrunedNetwork, run: Run, state: State, gradients: Gradients) -> dict[str, Proposal]:
        """A proposal for each problem. All are damped more where together they foretell to gain more than there is."""

        def propose() -> dict[str, Proposal]:
            return network.each_problem(
                lambda number, problem: self._proposal(network, run, state, gradients, number, problem), self.name
            )

        proposals = propose()
        for _ in range(ATTEMPTS):
            excess = -sum(proposal.change for proposal in proposals.values()) / max(state.best, TOLERANCE)
            if excess <= 1:
                break
            log.info("%s foretells to gain %.1f times the loss: damped more", self.name, excess)
            for name in state.damping:
                state.damping[name] *= max(2.0, excess)
            proposals = propose()
        return proposals

    def _proposal(
        self, network: PrunedNetwork, run: Run, state: State, gradients: Gradients, number: int, problem: Problem
    ) -> Proposal:
        damping, covariance = state.damping[problem.name], gradients.covariance
        model = QuadraticModel.of(network, problem, gradients.fisher, gradients.weight, damping, covariance=covariance)
        memory = self.propose(model, state.memory.get(problem.name), run.generator(state.round, 2, number))
        return Proposal(model.order, model.change, memory)

    def _step(
        self,
        network: PrunedNetwork,
        run: Run,
        state: State,
        gradients: Gradients,
        teacher_outputs: list[TeacherOutputs] | None,
    ) -> tuple[dict[str, Proposal], dict[str, float], float]:
        """Show proposals for all problems; returns them, their slopes by problem, and the held-out loss.

        Where the loss turns before a tenth of the way, and the slope at the end says so too, the models are far off.
        Then that slope says by how much each problem is to be damped more, and new proposals are shown.
        """
        before = network.current()
        for attempt in range(ATTEMPTS):
            proposals = self._proposals(network, run, state, gradients)
            orders = {name: proposal.order for name, proposal in proposals.items()}
            slopes = _slopes(network, before, orders, gradients)
            network.set_orders(orders)
            loss, slope = network.loss(run.held_out, self.objective, teacher_outputs), sum(slopes.values())
            if attempt == ATTEMPTS - 1 or slope > -TOLERANCE or _turn(slope, loss - state.best) >= FAR:
                break
            there = network.gradients(run.batch(state.round, self.examples), self.objective)
            ends = _slopes(network, before, orders, there)
            if sum(ends.values()) <= 0:
                break
            for name, start in slopes.items():
                if start < -TOLERANCE / 10:
                    state.damping[name] *= max(1.0, 1 - ends[name] / start)
            log.info("%s: held-out loss %.4f after a step much too far: damped more", self.name, loss)
            network.set_orders(before)
        return proposals, slopes, loss

    def _parts(
        self,
        network: PrunedNetwork,
        run: Run,
        state: State,
        before: Orders,
        proposals: dict[str, Proposal],
        whole: tuple[float, float],
        teacher_outputs: list[TeacherOutputs] | None,
    ) -> tuple[float, list[str]]:
        """Leave a part of the proposals shown that lowers the held-out loss; returns the loss and the part.

        `whole` are the slope of the loss along the step of all of them, and the loss at its end. The network shows the
        last part tried.
        """
        slope, loss = whole
        shuffled = torch.randperm(len(network.problems), generator=run.generator(state.round, 1))
        names = moved = [network.problems[i].name for i in shuffled]
        share = min(0.6, max(FAR, _turn(slope, loss - state.best)))
        for _ in range(ATTEMPTS - 1):
            if loss < state.best - TOLERANCE or len(moved) == 1:
                break
            moved = names[: max(1, round(share * len(names)))]
            network.set_orders({name: proposals[name].order if name in moved else before[name] for name in names})
            loss = network.loss(run.held_out, self.objective, teacher_outputs)
            share /= 2
        return loss, moved

    @staticmethod
    def _adapt(state: State, proposals: dict[str, Proposal], moved: list[str], kept: bool, change: float) -> None:
        """Raise the damping where parts had to be left out, and lower it where the model foretold the loss well.

        It falls as well for each problem that proposed nothing.
        """
        foretold = sum(proposals[name].change for name in moved)
        ratio = change / min(-1e-12, foretold)
        if not kept:
            factor = 1.6
        elif len(moved) < len(proposals):
            factor = 1.3
        else:
            factor = 0.8 if ratio > 0.5 else 1.0 if ratio > 0.2 else 1.2
        mean = sum(proposal.change for proposal in proposals.values()) / len(proposals)
        for name, proposal in proposals.items():
            state.damping[name] *= 0.7 if proposal.change >= STILL * mean else factor

    def _begin(self, network: PrunedNetwork, run: Run, teacher_outputs: list[TeacherOutputs] | None) -> State:
        """Start from the orders of `start`, or from the natural ones where those have the lower held-out loss."""
        start = self.start.solve(network, run)
        loss = network.loss(run.held_out, self.objective, teacher_outputs)
        network.set_orders(network.identity())
        natural = network.loss(run.held_out, self.objective, teacher_outputs)
        if natural < loss:
            log.info("%s begins in natural order: loss %.4f, %.4f after %s", self.name, natural, loss, self.start.name)
        else:
            network.set_orders(start.orders)
        damping = {problem.name: self.damping for problem in network.problems}
        state = State(0, min(natural, loss), damping, self.rate, seconds=start.seconds)
        state.curve.append(CurvePoint(0, state.best, True, state.seconds))
        return state

    def _resume(self, network: PrunedNetwork, run: Run) -> State | None:
        saved = self.checkpoint(run).load(self.name)
        if saved is None:
            return None
        tensors, values = saved
        memory, previous, weights = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (MEMORY, PREVIOUS, WEIGHT)
        )
        network.set_weights({name: weight.to(network.dense[name]) for name, weight in weights.items()})
        network.set_orders(tensors)
        curve = [CurvePoint(*point) for point in values.pop("curve")]
        log.info("%s goes on after round %d", self.name, values["round"])
        return State(**values, memory=memory, previous=previous, curve=curve)

    def _save(self, network: PrunedNetwork, run: Run, state: State) -> None:
        tensors = network.current()
        tensors |= {MEMORY + name: value for name, value in state.memory.items()}
        tensors |= {PREVIOUS + name: order.clone() for name, order in state.previous.items()}
        if self.tune:
            tensors |= {WEIGHT + name: weight for name, weight in network.weights.items()}
        values = {key: value for key, value in vars(state).items() if key not in ("memory", "previous", "curve")}
        values["curve"] = [[p.round, p.loss, p.kept, p.seconds] for p in state.curve]
        self.checkpoint(run).save(self.name, tensors, values)


def _turn(slope: float, change: float) -> float:
    """Where along a step, of length 1, the parabola has its least that begins with a slope and ends with a change."""
    return slope / (2 * min(slope - change, -1e-9))


def _slopes(network: PrunedNetwork, before: Orders, after: Orders, gradients: Gradients) -> dict[str, float]:
    """dLoss along the step between two choices of orders, by problem (see `PrunedNetwork.slope`)."""
    return network.each_problem(
        lambda _, problem: network.slope(problem, before[problem.name], after[problem.name], gradients.weight), None
    )


def _average(mean: Gradients | None, new: Gradients) -> Gradients:
    """The mean of all gradients taken at one point; `mean.count` of them are in `mean`."""
    if mean is None:
        return new
    total = mean.count + new.count

    def mix(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: a[name].lerp(b[name], new.count / total) for name in a}

    weight, fisher = mix(mean.weight, new.weight), mix(mean.fisher, new.fisher)
    return Gradients(weight, fisher, new.loss, total, mix(mean.covariance, new.covariance))
