"""Magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from permprune.saliency.base import Saliency


@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w|, independent of the inputs (Han et al. 2015, arXiv 1506.02626)."""

    name: ClassVar[str] = "magnitude"

    def score(self, weight: Tensor, moments: Tensor) -> Tensor:
        return weight.float().abs()
