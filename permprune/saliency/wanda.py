"""The Wanda saliency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.saliency.base import Saliency
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from jaxtyping import Float
    from torch import Tensor

    from permprune.calibration.moments import root_mean_square


@dataclass(frozen=True)
class Wanda(Saliency):
    """|w| * ||x_j||: weight times the norm of its input channel (Sun et al. 2024, arXiv 2306.11695, section 3)."""

    name: ClassVar[str] = "wanda"

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        return root_mean_square(moments)
