"""OBS: Optimal Brain Surgeon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.calibration.moments import inverse_factor
from permprune.options import NonNegative
from permprune.saliency.base import Saliency


@dataclass(frozen=True)
class OBS(Saliency):
    """|w| / sqrt([(H + damping * mean diagonal * I)^-1]_jj), the score of SparseGPT (Frantar & Alistarh 2023).

    Its square is the output error that remains when a weight is removed and all others of its row are updated to
    compensate (arXiv 2301.00774, section 3). SparseGPT itself uses H of the channels not yet processed, fewer at each
    step; here it is H of all channels. A channel that is always zero has score zero.
    """

    name: ClassVar[str] = "obs"
    damping: NonNegative = 0.01

    def score(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, "rows channels"]:
        deviation: Tensor = torch.linalg.vector_norm(inverse_factor(moments, self.damping), dim=0)
        return weight.float().abs() * (moments.diagonal() > 0) / deviation
