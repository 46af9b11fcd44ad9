"""The OBS saliency: Optimal Brain Surgeon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.options import NonNegative
from permprune.saliency.base import Saliency
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from permprune.calibration.moments import inverse_factor


@dataclass(frozen=True)
class OBS(Saliency):
    """|w| / sqrt([(H + damping * mean diagonal * I)^-1]_jj), the score of SparseGPT (Frantar & Alistarh 2023).

    The squared score is the output error that remains after a weight is removed and the others of its row are updated
    to compensate (arXiv 2301.00774, section 3). SparseGPT uses the H of the channels that are not yet processed, which
    become fewer at each step; this metric uses the H of all channels. `damping` is the share of the mean diagonal that
    is added to the diagonal of H. The weights of a channel that is always zero score 0.
    """

    name: ClassVar[str] = "obs"
    damping: NonNegative = 0.01

    def scale(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, " channels"]:
        deviation: Tensor = torch.linalg.vector_norm(inverse_factor(moments, self.damping), dim=0)
        return (moments.diagonal() > 0) / deviation
