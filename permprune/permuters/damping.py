"""How far a step of a trust-region search goes: one damping for each problem, which follows what steps brought."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

LEAST_SLOPE = 1e-5
"""Nats of foretold change below which a problem's slopes are noise."""

STILL = 1e-3
"""A problem whose foretold change is below this share of the mean one proposes nothing."""


class Damping:
    """The factor on the curvature of each problem's quadratic model; a large one makes steps short.

    Slopes, `before` and `after`, are dLoss along a problem's step, where it begins and where it ends.
    """

    def __init__(self, of: Mapping[str, float]) -> None:
        self.of = dict(of)

    @property
    def typical(self) -> float:
        """The median over the problems."""
        return median(self.of.values())

    def raise_all(self, factor: float) -> None:
        for name in self.of:
            self.of[name] *= factor

    def follow_slopes(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Adapt to the slopes at both ends of a step that was kept.

        A positive slope at the end means that the step was too long, a negative one that it was too short. Along a
        parabola that falls with slope s and ends with slope r * s the step was 1 / (1 - r) times too short; the damping
        takes half of that, in logarithm, since the slope is noisy.
        """
        for name, start in before.items():
            if start < -LEAST_SLOPE:
                self.of[name] *= min(2.0, max(0.5, max(0.0, 1 - after[name] / start) ** 0.5))

    def shorten(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Raise the damping to what the slopes at both ends of a step say that went much too far."""
        for name, start in before.items():
            if start < -LEAST_SLOPE:
                self.of[name] *= max(1.0, 1 - after[name] / start)

    def follow_loss(self, foretold: Mapping[str, float], moved: list[str], kept: bool, change: float) -> None:
        """Raise the damping where a part of the step had to be left out, lower it where the model foretold well.

        `foretold` are the changes of the loss that the models of all problems foretell, `change` what the step of the
        problems `moved` brought. It falls as well for each problem that proposed nothing.
        """
        ratio = change / min(-1e-12, sum(foretold[name] for name in moved))
        if not kept:
            factor = 1.6
        elif len(moved) < len(foretold):
            factor = 1.3
        else:
            factor = 0.8 if ratio > 0.5 else 1.0 if ratio > 0.2 else 1.2
        mean = sum(foretold.values()) / len(foretold)
        for name, own in foretold.items():
            self.of[name] *= 0.7 if own >= STILL * mean else factor


def turning_point(slope: float, change: float) -> float:
    """Where along a step, of length 1, the parabola has its least that begins with a slope and ends with a change."""
    return slope / (2 * min(slope - change, -1e-9))
