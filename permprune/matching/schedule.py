"""Schedules for epsilon, the entropy weight of the Sinkhorn matching, during the training of a cost matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from permprune.errors import PermpruneError


@dataclass(frozen=True)
class Epsilon(ABC):
    """A function from training progress to epsilon, in the unit of the costs, which falls from `start` to `end`.

    Raises `PermpruneError` unless start >= end > 0.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not math.inf > self.start >= self.end > 0:
            raise PermpruneError(
                f"epsilon cannot go from {self.start} to {self.end}: give positive numbers that do not rise"
            )

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return epsilon at `progress`, the fraction of steps done, from 0 to 1."""


@dataclass(frozen=True)
class Geometric(Epsilon):
    """Falls by a constant factor per step."""

    def __call__(self, progress: float) -> float:
        return float(self.start ** (1 - progress) * self.end**progress)


@dataclass(frozen=True)
class Cosine(Epsilon):
    """Falls along half a cosine."""

    def __call__(self, progress: float) -> float:
        high = (1 + math.cos(math.pi * progress)) / 2
        return high * self.start + (1 - high) * self.end
