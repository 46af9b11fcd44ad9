"""LearnedPaper: the learned permutation with the paper's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.losses.objective import Loss, LossFunction, Objective
from permprune.options import Count, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.cost_matrix import CostMatrixLearner
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from torch import Tensor

    from permprune.matching.sinkhorn import sinkhorn


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
