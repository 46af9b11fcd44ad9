"""The RIA saliency: relative importance and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.options import NonNegative
from permprune.saliency.base import Saliency, Scale
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from permprune.calibration.moments import root_mean_square
    from permprune.system import sharding

TINY = 1e-12
"""The least sum of a row or column, so that one of zeros scores zero instead of NaN."""


@dataclass(frozen=True)
class RIA(Saliency):
    """(|w| / column sum + |w| / row sum) * ||x_j||^power (Zhang et al. 2024, "Plug-and-Play", section 3.1).

    A `power` below 1 reduces the influence of the activations; the paper uses 0.5.
    """

    name: ClassVar[str] = "ria"
    power: NonNegative = 0.5

    def scale(self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]) -> Scale:
        size, norm = weight.float().abs(), root_mean_square(moments) ** self.power
        sums = [size.sum(dim) for dim in (0, 1)]
        sharding.add_(sums[0])
        columns, rows = (1 / total.clamp_min(TINY) for total in sums)
        return Scale(torch.stack([columns * norm, norm]), torch.stack([torch.ones_like(rows), rows], 1))
