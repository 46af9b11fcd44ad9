"""The magnitude saliency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.saliency.base import Saliency
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w|, independent of the inputs (Han et al. 2015, arXiv 1506.02626)."""

    name: ClassVar[str] = "magnitude"

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        return torch.ones_like(moments.diagonal())
