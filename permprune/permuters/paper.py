"""Learned, with the paper's own parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permprune.losses.loss import Loss, LossFunction
from permprune.losses.objective import Objective
from permprune.matching.sinkhorn import sinkhorn
from permprune.options import Count, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.cost_matrix import CostMatrixLearner


@dataclass(frozen=True)
class LearnedPaper(CostMatrixLearner):
    """The learned permutation of Li et al. 2026 (arXiv 2601.22980), "set-up".

    Channels in `groups` equal parts; the soft plan itself permutes the weights while epsilon falls from 1; 5 Sinkhorn
    iterations; AdamW with weight decay 0.01 and a cosine schedule; cross-entropy + 1e-5 * Smooth-L1 distillation.
    The paper trains for 20 epochs of its data; here `steps` says for how long. Where it starts is not published: a
    margin of 1 can be crossed in so few steps, one of 3 was not.
    """

    name: ClassVar[str] = "learned-paper"
    objective: Loss | LossFunction = Objective(distillation=1e-5)
    groups: Count = 4
    noise: NonNegative = 0.1

    def part_size(self, size: int, pattern: Pattern) -> int:
        return size // self.groups if size % (self.groups * pattern.m) == 0 else size

    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        return sinkhorn(cost, epsilon, self.iterations)
