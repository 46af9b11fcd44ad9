"""Cost matrices that are trained by gradient descent through the Sinkhorn matching and the pruned network.

The paper of the learned permutation and PermLLM do so, each with a relaxation and parameters of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from permprune.losses.objective import Loss, LossFunction, Objective
from permprune.options import Count, Natural, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.base import Identity, Permuter
from permprune.permuters.iterate import Iterative, Landscape, SearchState
from permprune.permuters.kept import RIAPermuter
from permprune.system.imports import on_first_use
from permprune.system.progress import log

with on_first_use(globals()):
    import torch
    from torch import Tensor
    from torch.optim.adamw import adamw

    from permprune.matching.assignment import assign
    from permprune.matching.sinkhorn import gumbel_noise, sinkhorn, straight_through
    from permprune.pruning.problem import Part, Problem

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""AdamW's betas and epsilon, those of PyTorch."""

LAST_EPSILON = 0.1
"""The entropy weight of the last step's matching; that of the first is 1."""


@dataclass(frozen=True)
class TrainedCost:
    """The costs C of a problem, (parts, channels, positions), and AdamW's moments; a step changes them in place.

    `order` is that in which the channels were split into parts.
    """

    order: Tensor
    cost: Tensor
    first: Tensor
    second: Tensor

    def to(self, device: torch.device) -> TrainedCost:
        """Return the same on a device; the order stays where it is."""
        return TrainedCost(self.order, *(matrix.to(device) for matrix in (self.cost, self.first, self.second)))


@dataclass(frozen=True, kw_only=True)
class CostMatrixState(SearchState):
    """The state of a `CostMatrixLearner`: the best orders so far, and the costs in training."""

    costs: dict[str, TrainedCost]


@dataclass(frozen=True)
class CostMatrixLearner(Iterative[CostMatrixState]):
    """Train C, the cost of each channel at each position, with AdamW; the weights of the network stay frozen.

    The channels are split into parts of equal size, in the order that `start` finds, with one cost matrix for each
    part. C is initialised to 0 for the positions in that order and to `margin` elsewhere. Each of `steps` steps relaxes
    the matching of C plus Gumbel noise (`relax`), runs the network with weights that were permuted, pruned and permuted
    back, computes the gradient of `objective` on `examples` calibration examples, and backpropagates it through mask
    and matching to C. The learning rate falls to 0 along half a cosine. Every `check` steps the exact assignment of C
    is evaluated on the held-out examples, and the best one is kept.
    """

    unit: ClassVar[str] = "step"
    state: ClassVar[type[SearchState]] = CostMatrixState
    start: Permuter = Identity()
    steps: Natural = 60
    examples: Count = 4
    check: Count = 10
    learning_rate: NonNegative = 0.1
    weight_decay: NonNegative = 0.01
    iterations: Count = 5
    noise: NonNegative = 0.0
    margin: NonNegative = 1.0

    @abstractmethod
    def part_size(self, size: int, pattern: Pattern) -> int:
        """Return the number of channels in each part of a problem of `size` channels."""

    @abstractmethod
    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        """Return doubly stochastic matrices (parts, channels, positions) for costs of that shape, differentiably."""

    def epsilon(self, progress: float) -> float:
        """The entropy weight of the matching after this share of the steps: it falls by a constant factor per step."""
        return math.pow(LAST_EPSILON, progress)

    def keep(self, score: Tensor, pattern: Pattern) -> Tensor:
        """Return the mask of scores (..., width), which are in stored order."""
        return pattern.mask(score.detach())

    @property
    def uses_fisher(self) -> bool:
        return self.start.uses_fisher

    @property
    def total(self) -> int:
        return self.steps

    def init(self, landscape: Landscape) -> CostMatrixState:
        network, start = landscape.network, self.start.solve(landscape.network, landscape.run)
        costs = {}
        for problem in network.problems:
            size = self.part_size(problem.size, network.pattern_of(problem))
            apart = 1 - torch.eye(size, device=network.device)
            cost = (self.margin * apart).repeat(problem.size // size, 1, 1)
            moments = torch.zeros_like(cost), torch.zeros_like(cost)
            costs[problem.name] = TrainedCost(start.orders[problem.name], cost, *moments)
        loss = landscape.held_out_loss()
        state = CostMatrixState(orders=start.orders, best=loss, seconds=start.seconds, costs=costs)
        return state.record(loss, kept=True)

    def step(self, landscape: Landscape, state: CostMatrixState) -> CostMatrixState:
        """Train the costs up to the next check, and keep their exact assignment if its held-out loss is the lowest."""
        costs = {name: trained.to(landscape.network.device) for name, trained in state.costs.items()}
        state = replace(state, costs=costs)
        for _ in range(min(self.check - state.number % self.check, self.steps - state.number)):
            state = self._descend(landscape, state)
        orders = {}
        for name, trained in state.costs.items():
            channels = trained.order.view(len(trained.cost), -1)
            orders[name] = channels.gather(1, assign(trained.cost).argsort(-1).cpu()).flatten()
        landscape.network.set_orders(orders)
        loss = landscape.held_out_loss()
        kept = loss < state.best
        best = loss if kept else state.best
        log.info("%s step %d: held-out loss %.4f, best %.4f", self.name, state.number, loss, best)
        if not kept:
            return state.record(loss, kept, moved=0)
        moved = sum(not torch.equal(order, state.orders[name]) for name, order in orders.items())
        return state.record(loss, kept, moved=moved, best=loss, orders=orders)

    def _descend(self, landscape: Landscape, state: CostMatrixState) -> CostMatrixState:
        """Make one step of AdamW."""
        gradients = self.gradients(landscape, state)
        trained = [state.costs[name] for name in gradients]
        rate = self.learning_rate * (1 + math.cos(math.pi * state.number / self.steps)) / 2
        with torch.no_grad():
            adamw(
                [each.cost for each in trained],
                list(gradients.values()),
                [each.first for each in trained],
                [each.second for each in trained],
                [],
                [torch.tensor(float(state.number)) for _ in trained],
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=self.weight_decay,
                eps=EPSILON,
                maximize=False,
            )
        return replace(state, number=state.number + 1)

    def gradients(self, landscape: Landscape, state: CostMatrixState) -> dict[str, Tensor]:
        """Return the gradients of the loss with respect to the costs, by problem, on the examples of the next step."""
        network = landscape.network
        with torch.no_grad():
            network.show(self.relaxed_weights(landscape, state))
        slopes = landscape.gradients(state.number, self.examples).weight
        network.set_orders({})  # the relaxed weights are not shown any more
        gradients = {}
        for problem, cost, relaxed in self._relaxed(landscape, state):
            weights = [weight for _, _, weight in relaxed]
            given = [slopes[part.layer][:, columns].float() for part, columns, _ in relaxed]
            torch.autograd.backward(weights, given)
            assert cost.grad is not None
            gradients[problem.name] = cost.grad
        return gradients

    def relaxed_weights(self, landscape: Landscape, state: CostMatrixState) -> dict[str, Tensor]:
        """Return the weights of the relaxed network, by layer, in the network's own order."""
        weights: dict[str, Tensor] = {}
        for _, _, relaxed in self._relaxed(landscape, state):
            for part, columns, weight in relaxed:
                if part.layer not in weights:
                    weights[part.layer] = landscape.network.shown[part.layer].float()
                weights[part.layer][:, columns] = weight
        return weights

    def _relaxed(
        self, landscape: Landscape, state: CostMatrixState
    ) -> Iterator[tuple[Problem, Tensor, list[tuple[Part, Tensor, Tensor]]]]:
        """Yield (problem, cost, [(part, its columns, their weights permuted, pruned and permuted back)])."""
        network, epsilon = landscape.network, self.epsilon(state.number / self.steps)
        for index, problem in enumerate(network.problems):
            trained = state.costs[problem.name]
            cost = trained.cost.detach().requires_grad_(True)
            noise = gumbel_noise(cost.shape, self.noise, landscape.run.generator(state.number, 3, index)).to(cost)
            plan = self.relax(cost + noise, epsilon)
            relaxed = []
            for part in problem.parts:
                columns = part.columns[trained.order]
                weight, score = (
                    matrix[part.layer][:, columns].float().unflatten(1, (len(plan), -1)).transpose(0, 1) @ plan
                    for matrix in (network.dense, network.scores)
                )
                back = (weight * self.keep(score, network.patterns[part.layer])) @ plan.mT
                relaxed.append((part, columns, back.transpose(0, 1).flatten(1)))
            yield problem, cost, relaxed


@dataclass(frozen=True)
class LearnedPaper(CostMatrixLearner):
    """The learned permutation of Li et al. 2026 (arXiv 2601.22980), "set-up".

    The channels are split into `groups` equal parts, and the soft plan itself permutes the weights while epsilon falls
    from 1. As in the paper there are 5 Sinkhorn iterations, AdamW has weight decay 0.01 and a cosine schedule, and the
    loss is cross-entropy + 1e-5 * Smooth-L1 distillation. The paper trains for 20 epochs of its data; here `steps` is
    the number of steps. The initial costs are not published: with a `margin` of 1 channels can change places in so few
    steps, with 3 they did not.
    """

    name: ClassVar[str] = "learned-paper"
    objective: Loss | LossFunction = Objective(distillation=1e-5)
    groups: Count = 4
    noise: NonNegative = 0.1

    def part_size(self, size: int, pattern: Pattern) -> int:
        return size // self.groups if size % (self.groups * pattern.m) == 0 else size

    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        return sinkhorn(cost, epsilon, self.iterations)


@dataclass(frozen=True)
class PermLLM(CostMatrixLearner):
    """PermLLM (Zou et al. 2025): a cost matrix for each block of 64 channels.

    Permutation and mask are hard in the forward pass; the backward pass uses the Sinkhorn plan and a softmax over each
    group. The temperature falls from 1 to 0.1, there are 5 Sinkhorn iterations, and the loss is 1 - the cosine
    similarity of the last block's output and the dense model's. The blocks divide the channels in RIA's order, as in
    the paper's better runs. The paper trains for 50 epochs of 8 batches with AdamW at a learning rate of 1e-3; here
    `steps` is the number of steps, and the learning rate is high enough for channels to change places in so few.
    """

    name: ClassVar[str] = "permllm"
    start: Permuter = RIAPermuter()
    objective: Loss | LossFunction = Objective(0.0, cosine=1.0)
    block: Count = 64
    learning_rate: NonNegative = 0.05

    def part_size(self, size: int, pattern: Pattern) -> int:
        return self.block if size % self.block == 0 and self.block % pattern.m == 0 else size

    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        return straight_through(cost, epsilon, self.iterations)

    def epsilon(self, progress: float) -> float:
        """The same, along half a cosine."""
        high = (1 + math.cos(math.pi * progress)) / 2
        return high + (1 - high) * LAST_EPSILON

    def keep(self, score: Tensor, pattern: Pattern) -> Tensor:
        soft = score.unflatten(-1, (-1, pattern.m)).softmax(-1).flatten(-2)
        hard: Tensor = pattern.mask(score.detach()) + (soft - soft.detach())
        return hard
