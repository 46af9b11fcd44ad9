"""The step length of a trust-region search: a damping for each problem, adapted to the outcome of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

LEAST_SLOPE = 1e-5
"""A problem's slopes are treated as noise if the predicted change of the loss is smaller than this, in nats."""

STILL = 1e-3
"""A problem counts as unmoved if its predicted change of the loss is below this share of the mean."""


class Damping:
    """A factor on the curvature of each problem's quadratic model; a larger factor makes shorter steps.

    In the methods, `before` and `after` are the directional derivatives of the loss along each problem's step, at its
    start and at its end.
    """

    def __init__(self, of: Mapping[str, float]) -> None:
        self.of = dict(of)

    @property
    def typical(self) -> float:
        """The median over the problems."""
        return median(self.of.values())

    def raise_all(self, factor: float) -> None:
        """Multiply the damping of every problem by `factor`."""
        for name in self.of:
            self.of[name] *= factor

    def follow_slopes(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Adapt to the slopes at both ends of a step that was kept.

        A positive slope at the end means that the step was too long, a negative one that it was too short. If the slope
        is s at the start and r * s at the end, the minimum of the parabola is at 1 / (1 - r) of the step. The damping
        is multiplied by only the square root of 1 - r, between 0.5 and 2, because the slopes are noisy.
        """
        for name, start in before.items():
            if start < -LEAST_SLOPE:
                self.of[name] *= min(2.0, max(0.5, max(0.0, 1 - after[name] / start) ** 0.5))

    def shorten(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Raise the damping after a step that was much too long, by the factor that its slopes suggest."""
        for name, start in before.items():
            if start < -LEAST_SLOPE:
                self.of[name] *= max(1.0, 1 - after[name] / start)

    def follow_loss(self, predicted: Mapping[str, float], moved: list[str], kept: bool, change: float) -> None:
        """Raise the damping if all or part of the step was rejected, and lower it if the model predicted well.

        `predicted` are the changes of the loss that the models of all problems predict. `change` is the measured change
        for the problems in `moved`, and `kept` is whether they keep their new orders. The damping of a problem whose
        predicted change is negligible (see `STILL`) is always lowered.
        """
        ratio = change / min(-1e-12, sum(predicted[name] for name in moved))
        if not kept:
            factor = 1.6
        elif len(moved) < len(predicted):
            factor = 1.3
        else:
            factor = 0.8 if ratio > 0.5 else 1.0 if ratio > 0.2 else 1.2
        mean = sum(predicted.values()) / len(predicted)
        for name, own in predicted.items():
            self.of[name] *= 0.7 if own >= STILL * mean else factor


def turning_point(slope: float, change: float) -> float:
    """Return the position, along a step of length 1, of the minimum of a parabola.

    The parabola starts at 0 with slope `slope` and has the value `change` at the end of the step.
    """
    return slope / (2 * min(slope - change, -1e-9))
