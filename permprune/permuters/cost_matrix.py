"""Cost matrices trained by gradient descent through the Sinkhorn matching and the pruned network."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor

from permprune.losses.objective import Objective, TeacherOutputs
from permprune.matching.assignment import assign
from permprune.matching.relaxation import gumbel_noise
from permprune.matching.schedule import Epsilon, Geometric
from permprune.options import Count, Natural, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.base import ORDER, CurvePoint, Permuter, Run, Solution
from permprune.permuters.identity import Identity
from permprune.pruning.network import PrunedNetwork
from permprune.pruning.problem import Orders, Part, Problem
from permprune.system import distributed
from permprune.system.progress import console, log

COST, FIRST, SECOND = "cost/", "first/", "second/"
"""Prefixes of costs and AdamW's moments among the tensors of a checkpoint."""


@dataclass
class State:
    """Where the training stands: the costs by problem with their optimiser, and the best orders so far."""

    costs: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    orders: Orders
    best: float
    step: int = 0
    seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)


@dataclass(frozen=True)
class CostMatrixLearner(Permuter):
    """Train C, the cost of every channel at every position, by AdamW; the weights of the network stay frozen.

    Channels are split in parts of equal size, in the order that `start` finds, with a cost matrix each; C begins at 0
    there and at `margin` elsewhere. Each of `steps` steps relaxes the matching of C plus Gumbel noise (`relax`), shows
    the network permuted, pruned and permuted back, takes the gradient of `objective` on `examples` calibration examples
    and sends it through mask and matching to C. The learning rate falls to zero along half a cosine. Every `check`
    steps the exact assignment of C is tried on the held-out examples, and the best is kept.
    """

    start: Permuter = Identity()
    objective: Objective = Objective()
    steps: Natural = 60
    examples: Count = 4
    check: Count = 10
    learning_rate: NonNegative = 0.1
    weight_decay: NonNegative = 0.01
    iterations: Count = 5
    epsilon: Epsilon = Geometric(1.0, 0.1)
    noise: NonNegative = 0.0
    margin: NonNegative = 1.0

    @abstractmethod
    def part_size(self, size: int, pattern: Pattern) -> int:
        """Channels of each part, for a problem of `size` channels."""

    @abstractmethod
    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        """A doubly stochastic (parts, channels, positions) for such costs, with its graph."""

    def keep(self, score: Tensor, pattern: Pattern) -> Tensor:
        """The mask of scores (..., width), in stored order."""
        return pattern.mask(score.detach())

    def state_bytes(self, network: PrunedNetwork) -> int:
        parts = [
            (problem.size, self.part_size(problem.size, network.pattern_of(problem))) for problem in network.problems
        ]
        return super().state_bytes(network) + sum(24 * size * part for size, part in parts)  # C and two moments, twice

    def search(self, network: PrunedNetwork, run: Run) -> Solution:
        start = self.start.solve(network, run)
        teacher_outputs = network.compute_teacher_outputs(run.held_out, self.objective)
        state = self._resume(network, run) or self._begin(network, run, start, teacher_outputs)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(self.name, total=self.steps, completed=state.step)
            while state.step < self.steps and not (run.minutes and state.seconds > 60 * run.minutes):
                began = time.monotonic()
                self._step(network, run, state, start.orders)
                if state.step % self.check == 0 or state.step == self.steps:
                    self._try(network, run, state, start.orders, teacher_outputs)
                    self._save(run, state)
                state.seconds += distributed.mean(time.monotonic() - began)
                bar.update(task, advance=1, description=f"{self.name}: held-out loss {state.best:.4f}")
        network.set_orders(state.orders)
        return Solution(state.orders, state.seconds, tuple(state.curve))

    def _step(self, network: PrunedNetwork, run: Run, state: State, starts: Orders) -> None:
        """One step of AdamW; leaves the network as it was."""
        batch = run.batch(state.step, self.examples)
        with torch.no_grad():
            network.show(self._shown(network, run, state, starts))
        slope = network.gradients(batch, self.objective).weight
        network.set_orders({})
        for _, cost, shown in self._prune(network, run, state, starts):
            cost.grad = None
            pairs = [(weight, slope[part.layer][:, columns]) for part, columns, weight in shown]
            torch.autograd.backward([weight for weight, _ in pairs], [gradient for _, gradient in pairs])
        done = state.step / self.steps
        state.optimizer.param_groups[0]["lr"] = self.learning_rate * (1 + math.cos(math.pi * done)) / 2
        state.optimizer.step()
        state.step += 1

    def _shown(self, network: PrunedNetwork, run: Run, state: State, starts: Orders) -> dict[str, Tensor]:
        """The weights of the relaxed network, by layer, in the network's own order."""
        found: dict[str, Tensor] = {}
        for _, _, shown in self._prune(network, run, state, starts):
            for part, columns, weight in shown:
                found.setdefault(part.layer, network.layers[part.layer].weight.clone())[:, columns] = weight
        return found

    def _prune(
        self, network: PrunedNetwork, run: Run, state: State, starts: Orders
    ) -> Iterator[tuple[Problem, Tensor, list[tuple[Part, Tensor, Tensor]]]]:
        """(problem, cost, [(part, its columns, their weights permuted, pruned and permuted back)])."""
        epsilon = self.epsilon(state.step / self.steps)
        for index, problem in enumerate(network.problems):
            cost = state.costs[problem.name]
            noise = gumbel_noise(cost.shape, self.noise, run.generator(state.step, 3, index)).to(cost)
            plan = self.relax(cost + noise, epsilon)
            shown = []
            for part in problem.parts:
                columns = part.columns[starts[problem.name]]
                weight, score = (
                    matrix[part.layer][:, columns].float().unflatten(1, (len(plan), -1)).transpose(0, 1) @ plan
                    for matrix in (network.dense, network.scores)
                )
                back = (weight * self.keep(score, network.pattern_of(problem))) @ plan.mT
                shown.append((part, columns, back.transpose(0, 1).flatten(1)))
            yield problem, cost, shown

    def _try(
        self,
        network: PrunedNetwork,
        run: Run,
        state: State,
        starts: Orders,
        teacher_outputs: list[TeacherOutputs] | None,
    ) -> None:
        orders = {}
        for name, cost in state.costs.items():
            channels = starts[name].view(len(cost), -1)
            orders[name] = channels.gather(1, assign(cost).argsort(-1).cpu()).flatten()
        network.set_orders(orders)
        loss = network.loss(run.held_out, self.objective, teacher_outputs)
        kept = loss < state.best
        if kept:
            state.best, state.orders = loss, orders
        state.curve.append(CurvePoint(state.step, loss, kept, state.seconds))
        log.info("%s step %d: held-out loss %.4f, best %.4f", self.name, state.step, loss, state.best)

    def _begin(
        self, network: PrunedNetwork, run: Run, start: Solution, teacher_outputs: list[TeacherOutputs] | None
    ) -> State:
        costs = {}
        for problem in network.problems:
            size = self.part_size(problem.size, network.pattern_of(problem))
            device = network.dense[problem.parts[0].layer].device
            costs[problem.name] = (self.margin * (1 - torch.eye(size, device=device))).repeat(
                problem.size // size, 1, 1
            )
        best = network.loss(run.held_out, self.objective, teacher_outputs)
        state = State(costs, self._optimizer(costs), start.orders, best, seconds=start.seconds)
        state.curve.append(CurvePoint(0, best, True, state.seconds))
        return state

    def _optimizer(self, costs: dict[str, Tensor]) -> torch.optim.AdamW:
        for cost in costs.values():
            cost.requires_grad_(True)
        return torch.optim.AdamW(costs.values(), self.learning_rate, weight_decay=self.weight_decay)

    def _save(self, run: Run, state: State) -> None:
        tensors = {ORDER + name: order for name, order in state.orders.items()}
        for name, cost in state.costs.items():
            moments = state.optimizer.state[cost]
            tensors |= {
                COST + name: cost.detach(),
                FIRST + name: moments["exp_avg"],
                SECOND + name: moments["exp_avg_sq"],
            }
        curve = [[p.round, p.loss, p.kept, p.seconds] for p in state.curve]
        values = {"step": state.step, "best": state.best, "seconds": state.seconds, "curve": curve}
        self.checkpoint(run).save(self.name, tensors, values)

    def _resume(self, network: PrunedNetwork, run: Run) -> State | None:
        saved = self.checkpoint(run).load(self.name)
        if saved is None:
            return None
        tensors, values = saved
        names = [problem.name for problem in network.problems]
        devices = {problem.name: network.dense[problem.parts[0].layer].device for problem in network.problems}
        costs = {name: tensors[COST + name].to(devices[name]) for name in names}
        state = State(costs, self._optimizer(costs), {name: tensors[ORDER + name] for name in names}, values["best"])
        for name, cost in costs.items():
            state.optimizer.state[cost] = {
                "step": torch.tensor(float(values["step"])),
                "exp_avg": tensors[FIRST + name].to(cost),
                "exp_avg_sq": tensors[SECOND + name].to(cost),
            }
        state.step, state.seconds = values["step"], values["seconds"]
        state.curve = [CurvePoint(*point) for point in values["curve"]]
        log.info("%s goes on after step %d", self.name, state.step)
        return state
