"""The RIA saliency: relative importance and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from permprune.calibration.moments import root_mean_square
from permprune.options import NonNegative
from permprune.saliency.base import Saliency


@dataclass(frozen=True)
class RIA(Saliency):
    """(|w| / column sum + |w| / row sum) * ||x_j||^power (Zhang et al. 2024, "Plug-and-Play", section 3.1).

    A `power` below 1 reduces the influence of the activations; the paper uses 0.5.
    """

    name: ClassVar[str] = "ria"
    power: NonNegative = 0.5

    def score(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, "rows channels"]:
        size = weight.float().abs()
        tiny = 1e-12  # a row or column of zeros scores zero instead of NaN
        relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
        return relative * root_mean_square(moments) ** self.power
