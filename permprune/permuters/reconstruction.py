"""Reconstruction: swaps that lower each layer's own output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from permprune.network import PrunedNetwork
from permprune.permuters.base import LocalPermuter
from permprune.permuters.kept import deal_and_assign, stacked_scores
from permprune.permuters.quadratic import QuadraticModel
from permprune.problem import Problem


@dataclass(frozen=True)
class Reconstruction(LocalPermuter):
    """Minimise tr(F E H E^T) of every layer: its output error on the calibration tokens, exact in the masks.

    E is the pruned part of the weight, H the input second moments, F the diagonal of the output's Fisher information,
    which tells rows the loss feels from rows it does not. It starts from the order that keeps the most score under the
    same row weights; then `swaps` rounds try one random swap in every pair of a random pairing of the groups.
    """

    name: ClassVar[str] = "reconstruction"
    swaps: int = 80

    def order(self, network: PrunedNetwork, problem: Problem, generator: torch.Generator) -> Tensor:
        fisher = network.statistics.fisher
        energy = stacked_scores(network, problem, fisher).square()
        network.set_orders({problem.name: deal_and_assign(energy, network.pattern)})
        model = QuadraticModel.of(network, problem, fisher)
        for _ in range(self.swaps):
            model.swap(generator)
        return model.order
