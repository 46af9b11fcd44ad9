"""What every saliency metric answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Saliency(ABC):
    """How much each weight of a layer matters; the larger, the sooner it is kept."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, weight: Tensor, norm: Tensor) -> Tensor:
        """Score each weight.

        `weight` is (rows, channels); `norm` is (channels,), the root mean square of each input channel over the
        calibration tokens. Returns non-negative scores (rows, channels) in fp32.
        """
