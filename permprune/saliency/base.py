"""What every saliency metric answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permprune.options import require_fields


@dataclass(frozen=True)
class Saliency(ABC):
    """How much each weight of a layer matters; the larger, the sooner it is kept."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def score(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Score each weight.

        `weight` is (rows, channels); `moments` is H = X^T X / tokens of its inputs over the calibration tokens, fp32
        (channels, channels). Returns non-negative scores (rows, channels) in fp32. Raises `PermpruneError` where H does
        not do.
        """
