"""Newton: end-to-end trust-region search by swaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.options import Natural
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.trust_region import TrustRegion
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Newton(TrustRegion):
    """End-to-end search by swaps: in each round every group of channels makes up to `swaps` swaps.

    Swaps are chosen with the damped quadratic model of the loss; those that lower it most come first.
    """

    name: ClassVar[str] = "newton"
    swaps: Natural = 4

    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        model.swap(generator, self.swaps)
        return memory
