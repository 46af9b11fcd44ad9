"""RIA's channel permutation: channels are dealt to groups, then reassigned slot by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.permuters.base import ScorePermuter, Scores
from permprune.permuters.kept import ria_order, scores_by_layer
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.problem import Problem


@dataclass(frozen=True)
class RIAPermuter(ScorePermuter):
    """Keep the most score, with equally weighted rows (Zhang et al. 2024, "Plug-and-Play", section 3.2)."""

    name: ClassVar[str] = "ria"

    @property
    def divides_rows(self) -> bool:
        return True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return ria_order(scores_by_layer(network, problem), network.pattern_of(problem))
