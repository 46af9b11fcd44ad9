"""The interface of saliency metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from permprune.options import require_fields


@dataclass(frozen=True)
class Saliency(ABC):
    """A score for each weight of a layer: in every group the weights with the largest scores are kept."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def score(
        self, weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]
    ) -> Float[Tensor, "rows channels"]:
        """Score each weight.

        `weight` is (rows, channels) = (outputs, inputs); `moments` are the second moments of the inputs over the
        calibration tokens, H = X^T X / tokens, fp32 (channels, channels). Returns non-negative scores, fp32
        (rows, channels). Raises `PermpruneError` if H cannot be used.
        """
