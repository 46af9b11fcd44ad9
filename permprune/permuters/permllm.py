"""PermLLM: learned permutations of blocks of channels, hard in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.losses.objective import Loss, LossFunction, Objective
from permprune.matching.schedule import Cosine, Epsilon
from permprune.options import Count, NonNegative
from permprune.pattern import Pattern
from permprune.permuters.base import Permuter
from permprune.permuters.cost_matrix import CostMatrixLearner
from permprune.permuters.ria import RIAPermuter
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from torch import Tensor

    from permprune.matching.sinkhorn import straight_through


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
    epsilon: Epsilon = Cosine(1.0, 0.1)

    def part_size(self, size: int, pattern: Pattern) -> int:
        return self.block if size % self.block == 0 and self.block % pattern.m == 0 else size

    def relax(self, cost: Tensor, epsilon: float) -> Tensor:
        return straight_through(cost, epsilon, self.iterations)

    def keep(self, score: Tensor, pattern: Pattern) -> Tensor:
        soft = score.unflatten(-1, (-1, pattern.m)).softmax(-1).flatten(-2)
        hard: Tensor = pattern.mask(score.detach()) + (soft - soft.detach())
        return hard
