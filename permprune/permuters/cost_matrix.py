"""Cost matrices that are trained by gradient descent through the Sinkhorn matching and the pruned network."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from permprune.matching.schedule import Epsilon, Geometric
from permprune.options import Count, Natural, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.base import ORDER, Permuter, Run, Solution
from permprune.permuters.identity import Identity
from permprune.permuters.iterate import Iterative, Search
from permprune.system.imports import on_first_use
from permprune.system.progress import log

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.matching.assignment import assign
    from permprune.matching.relaxation import gumbel_noise
    from permprune.pruning.network import PrunedNetwork
    from permprune.pruning.problem import Part, Problem

COST, FIRST, SECOND = "cost/", "first/", "second/"
"""Prefixes of costs and of AdamW's moments among the tensors of a state."""


@dataclass(frozen=True)
class CostMatrixLearner(Iterative):
    """Train C, the cost of each channel at each position, with AdamW; the weights of the network stay frozen.

    The channels are split into parts of equal size, in the order that `start` finds, with one cost matrix for each
    part. C is initialised to 0 for the positions in that order and to `margin` elsewhere. Each of `steps` steps relaxes
    the matching of C plus Gumbel noise (`relax`), runs the network with weights that were permuted, pruned and permuted
    back, computes the gradient of `objective` on `examples` calibration examples, and backpropagates it through mask
    and matching to C. The learning rate falls to 0 along half a cosine. Every `check` steps the exact assignment of C
    is evaluated on the held-out examples, and the best one is kept.
    """

    start: Permuter = Identity()
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
        """Return the number of channels in each part of a problem of `size` channels."""

    @abstractmethod
    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        """Return doubly stochastic matrices (parts, channels, positions) for costs of that shape, differentiably."""

    def keep(self, score: Tensor, pattern: Pattern) -> Tensor:
        """Return the mask of scores (..., width), which are in stored order."""
        return pattern.mask(score.detach())

    @property
    def total(self) -> int:
        return self.steps

    def begin(self, network: PrunedNetwork, run: Run) -> Search:
        return CostMatrixSearch(self, network, run)


class CostMatrixSearch(Search):
    """The training of the costs; a round is `check` steps, followed by an evaluation of the exact assignment.

    `costs` are C by problem, (parts, channels, positions); `starts` are the orders in which the channels were split,
    and `orders` the best orders so far.
    """

    unit: ClassVar[str] = "step"

    def __init__(self, method: CostMatrixLearner, network: PrunedNetwork, run: Run) -> None:
        super().__init__(method, network, run)
        self.method = method
        start = method.start.solve(network, run)
        self.starts = self.orders = start.orders
        self.seconds = start.seconds
        self.costs: dict[str, Tensor] = {}

    def start(self) -> None:
        for problem in self.network.problems:
            size = self.method.part_size(problem.size, self.network.pattern_of(problem))
            apart = 1 - torch.eye(size, device=self._device(problem))
            self.costs[problem.name] = (self.method.margin * apart).repeat(problem.size // size, 1, 1)
        self.optimizer = self._optimizer()
        self.best = self.held_out_loss()
        self.record(self.best, kept=True)

    def step(self) -> int:
        for _ in range(min(self.method.check - self.done % self.method.check, self.method.steps - self.done)):
            self._descend()
        return self._try()

    def end(self) -> Solution:
        self.network.set_orders(self.orders)
        return Solution(self.orders, self.seconds, tuple(self.curve))

    def tensors(self) -> dict[str, Tensor]:
        found = {ORDER + name: order for name, order in self.orders.items()}
        for name, cost in self.costs.items():
            moments = self.optimizer.state[cost]
            found |= {
                COST + name: cost.detach(),
                FIRST + name: moments["exp_avg"],
                SECOND + name: moments["exp_avg_sq"],
            }
        return found

    def values(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        problems = self.network.problems
        self.orders = {problem.name: tensors[ORDER + problem.name] for problem in problems}
        self.costs = {problem.name: tensors[COST + problem.name].to(self._device(problem)) for problem in problems}
        self.optimizer = self._optimizer()
        for name, cost in self.costs.items():
            self.optimizer.state[cost] = {
                "step": torch.tensor(float(self.done)),
                "exp_avg": tensors[FIRST + name].to(cost),
                "exp_avg_sq": tensors[SECOND + name].to(cost),
            }

    def _descend(self) -> None:
        """Make one step of AdamW; the network's orders and weights are restored."""
        batch = self.run.batch(self.done, self.method.examples)
        with torch.no_grad():
            self.network.show(self._shown())
        slope = self.network.gradients(batch, self.loss).weight
        self.network.set_orders({})
        for _, cost, shown in self._prune():
            cost.grad = None
            pairs = [(weight, slope[part.layer][:, columns].float()) for part, columns, weight in shown]
            torch.autograd.backward([weight for weight, _ in pairs], [gradient for _, gradient in pairs])
        rate = self.method.learning_rate * (1 + math.cos(math.pi * self._progress())) / 2
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.done += 1

    def _shown(self) -> dict[str, Tensor]:
        """Return the weights of the relaxed network, by layer, in the network's own order."""
        found: dict[str, Tensor] = {}
        for _, _, shown in self._prune():
            for part, columns, weight in shown:
                if part.layer not in found:
                    found[part.layer] = self.network.shown[part.layer].float()
                found[part.layer][:, columns] = weight
        return found

    def _prune(self) -> Iterator[tuple[Problem, Tensor, list[tuple[Part, Tensor, Tensor]]]]:
        """Yield (problem, cost, [(part, its columns, their weights permuted, pruned and permuted back)])."""
        method, network = self.method, self.network
        epsilon = method.epsilon(self._progress())
        for index, problem in enumerate(network.problems):
            cost = self.costs[problem.name]
            noise = gumbel_noise(cost.shape, method.noise, self.run.generator(self.done, 3, index)).to(cost)
            plan = method.relax(cost + noise, epsilon)
            shown = []
            for part in problem.parts:
                columns = part.columns[self.starts[problem.name]]
                weight, score = (
                    matrix[part.layer][:, columns].float().unflatten(1, (len(plan), -1)).transpose(0, 1) @ plan
                    for matrix in (network.dense, network.scores)
                )
                back = (weight * method.keep(score, network.pattern_of(problem))) @ plan.mT
                shown.append((part, columns, back.transpose(0, 1).flatten(1)))
            yield problem, cost, shown

    def _try(self) -> int:
        """Keep the exact assignment of the costs if its held-out loss is the lowest; returns how many orders change."""
        orders = {}
        for name, cost in self.costs.items():
            channels = self.starts[name].view(len(cost), -1)
            orders[name] = channels.gather(1, assign(cost).argsort(-1).cpu()).flatten()
        self.network.set_orders(orders)
        loss = self.held_out_loss()
        kept, moved = loss < self.best, 0
        if kept:
            moved = sum(not torch.equal(order, self.orders[name]) for name, order in orders.items())
            self.best, self.orders = loss, orders
        self.record(loss, kept)
        log.info("%s step %d: held-out loss %.4f, best %.4f", self.name, self.done, loss, self.best)
        return moved

    def _progress(self) -> float:
        return self.done / self.method.steps

    def _device(self, problem: Problem) -> torch.device:
        return self.network.dense[problem.parts[0].layer].device

    def _optimizer(self) -> torch.optim.AdamW:
        for cost in self.costs.values():
            cost.requires_grad_(True)
        return torch.optim.AdamW(self.costs.values(), self.method.learning_rate, weight_decay=self.method.weight_decay)
