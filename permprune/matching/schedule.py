"""Schedules for epsilon, the entropy weight of the Sinkhorn matching, during the training of a cost matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from permprune.errors import PermpruneError


class Epsilon(Protocol):
    """A function from training progress to epsilon, in the unit of the costs."""

    def __call__(self, progress: float) -> float:
        """Return epsilon at `progress`, the fraction of steps done. Raises `PermpruneError` outside [0, 1]."""
        ...


@dataclass(frozen=True)
class Geometric:
    """Falls from `start` to `end` by a constant factor per step. Raises `PermpruneError` unless start >= end > 0."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _require_falling(self.start, self.end)

    def __call__(self, progress: float) -> float:
        _require_share(progress)
        return float(self.start ** (1 - progress) * self.end**progress)


@dataclass(frozen=True)
class Cosine:
    """Falls from `start` to `end` along half a cosine. Raises `PermpruneError` unless start >= end > 0."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _require_falling(self.start, self.end)

    def __call__(self, progress: float) -> float:
        _require_share(progress)
        high = (1 + math.cos(math.pi * progress)) / 2
        return high * self.start + (1 - high) * self.end


def _require_falling(start: float, end: float) -> None:
    if not math.inf > start >= end > 0:
        raise PermpruneError(f"epsilon cannot go from {start} to {end}: give positive numbers that do not rise")


def _require_share(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise PermpruneError(f"progress is {progress}: give the share of the steps done, from 0 to 1")
