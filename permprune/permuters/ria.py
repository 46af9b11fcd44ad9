"""RIA's channel permutation: channels are dealt to groups, then reassigned slot by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.permuters.base import ScorePermuter, Scores, each_problem_work
from permprune.permuters.kept import assignment_bytes, assignment_work, deal_and_assign, stacked_bytes, stacked_scores
from permprune.system.imports import on_first_use
from permprune.system.resources import Held, Stage

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.outline import Outline, Passes
    from permprune.pruning.problem import Problem


@dataclass(frozen=True)
class RIAPermuter(ScorePermuter):
    """Keep the most score, with equally weighted rows (Zhang et al. 2024, "Plug-and-Play", section 3.2)."""

    name: ClassVar[str] = "ria"

    @property
    def divides_rows(self) -> bool:
        return True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return deal_and_assign(stacked_scores(network, problem), network.pattern_of(problem))

    def stages(self, outline: Outline, passes: Passes, threads: int) -> list[Stage]:
        scores = stacked_bytes(outline.largest_weights(threads)) + assignment_bytes(threads)
        return [
            Stage(self.name, (Held("largest problem's scores", scores),), each_problem_work(outline, assignment_work))
        ]
