"""The baselines: no permutation, and a random one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.permuters.base import ScorePermuter, Scores
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.problem import Problem


@dataclass(frozen=True)
class Identity(ScorePermuter):
    """Keep the natural order."""

    name: ClassVar[str] = "none"

    @property
    def divides_rows(self) -> bool:
        return True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return problem.identity()


@dataclass(frozen=True)
class Random(ScorePermuter):
    """Take a uniformly random order."""

    name: ClassVar[str] = "random"

    @property
    def divides_rows(self) -> bool:
        return True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return torch.randperm(problem.size, generator=generator)
