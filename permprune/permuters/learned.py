"""Learned: a cost matrix of permutations that is trained through the Sinkhorn matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.losses.objective import Loss, LossFunction, Objective
from permprune.options import Count, Natural, NonNegative, Share
from permprune.pattern import Pattern
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.trust_region import TrustRegion
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.matching.assignment import assign
    from permprune.matching.sinkhorn import gumbel_noise, sinkhorn

LAST_EPSILON = 0.02
"""The entropy weight of the last pass of a round, in units of the mean absolute cost; that of the first is 1."""


@dataclass(frozen=True)
class Learned(TrustRegion):
    """Learn the cost C of each channel at each position (Li et al. 2026), in units of the loss.

    The channels are split into `groups` equal parts, each with its own permutation. A round makes `steps` passes over
    the parts. A pass frees one slot of every group and trains C for these slots, where dLoss/dP has a closed form that
    accounts for the weights that a channel displaces (`placement_cost`). In the natural metric of an entropic plan that
    gradient is the step itself (mirror descent), so that C <- decay * C + dLoss/dP keeps its scale. The plan P is the
    Sinkhorn matching of C plus Gumbel noise, whose entropy weight falls over the round's passes. The network always has
    a hard permutation: channels move by the exact assignment of P, as far as the quadratic model predicts a lower loss.
    """

    name: ClassVar[str] = "learned"
    rounds: Natural = 16
    objective: Loss | LossFunction = Objective(distillation=1e-5)
    groups: Count = 4
    steps: Count = 4
    decay: Share = 0.5
    noise: NonNegative = 0.1
    iterations: Count = 20

    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor:
        count, m = model.groups.shape
        parts = count * m // self.part_size(count * m, model.pattern)
        cost = torch.zeros(count * m, count * m // parts) if memory is None else memory.clone()
        for step in range(self.steps):
            slots = torch.randint(m, (count,), generator=generator)
            for free in torch.arange(count).chunk(parts):
                rows = model.groups[free, slots[free]][:, None]
                columns = ((free - free[0]) * m + slots[free])[None, :]
                gradient = model.placement_cost(free, slots[free])
                cost[rows, columns] = self.decay * cost[rows, columns] + gradient
                target = self._match(cost[rows, columns], step / max(1, self.steps - 1), generator)
                model.move(free, slots[free], target, gradient)
        return cost

    def part_size(self, size: int, pattern: Pattern) -> int:
        """Return the number of channels in each part of a problem of `size` channels."""
        count = size // pattern.m
        return size // self.groups if count % self.groups == 0 and count > self.groups else size

    def _match(self, cost: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """Return the column of each row in the permutation closest to the noisy Sinkhorn plan."""
        epsilon = LAST_EPSILON**progress * max(float(cost.abs().mean()), 1e-30)
        noise = gumbel_noise(cost.shape, self.noise * epsilon, generator)
        return assign(-sinkhorn(cost + noise, epsilon, self.iterations))
