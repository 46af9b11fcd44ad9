"""Draw docs/concepts/search.svg: one round of the end-to-end search, and what damping does.

python docs/figures/search.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import BLUE, GRAY, GREEN, ORANGE, arrow, box, canvas, label, save

STEPS = (
    (3.4, "1  gradient of the loss in every\nmask, on fresh calibration data"),
    (2.1, "2  a quadratic model of the loss\nfor each order, with damping"),
    (0.8, "3  the moves of channels that\nlower the model the most"),
)


def round_of_search(axes: Axes) -> None:
    """The steps of a round, and where it goes from the test on held-out data."""
    label(axes, 0.3, 4.85, "One round", 12, bold=True)
    for y, text in STEPS:
        box(axes, 0.3, y, 3.6, 0.9, text)
    for (y, _), (below, _) in itertools.pairwise(STEPS):
        arrow(axes, (2.1, y), (2.1, below + 0.92))
    box(axes, 4.9, 0.8, 2.9, 0.9, "4  is the loss on held-out\ncalibration data lower?", color=BLUE)
    arrow(axes, (3.9, 1.25), (4.87, 1.25))
    box(axes, 4.9, 2.1, 2.9, 0.9, "no: try a part of the moves;\nthen more damping", color=ORANGE)
    box(axes, 4.9, 3.4, 2.9, 0.9, "yes: keep the orders", color=GREEN)
    arrow(axes, (6.35, 1.7), (6.35, 2.08), ORANGE)
    arrow(axes, (7.8, 1.25), (7.82, 3.85), GREEN, bend=0.35)
    arrow(axes, (4.9, 2.55), (3.92, 2.55), ORANGE)
    arrow(axes, (4.9, 3.85), (3.92, 3.85), GREEN)


def damping(axes: Axes) -> None:
    """The loss along a step, and the model with too little, with enough and with too much damping."""
    label(axes, 0, 1.16, "The model along a step", 12, bold=True)
    step = np.linspace(0, 1.4, 200)
    axes.plot(step, 0.62 - 1.5 * step + 2.1 * step**2 - 0.25 * step**3, color=GRAY, linewidth=2.2)
    ends = []
    for curvature, color in ((1.1, ORANGE), (2.0, GREEN), (5.5, BLUE)):
        least = 1.5 / (2 * curvature)
        shown = step[step <= 1.35 * least]
        axes.plot(shown, 0.62 - 1.5 * shown + curvature * shown**2, color=color, linewidth=1.3, linestyle=(0, (4, 2)))
        axes.plot(least, 0.62 - 1.5 * least + curvature * least**2, "o", color=color, markersize=5)
        ends.append(least)
    axes.text(0.98, 0.9, "the loss", color=GRAY, fontsize=9.5, ha="right")
    axes.text(0.8, 0.02, "too little damping:\nthe step is too long", color=ORANGE, fontsize=9.5, va="center")
    axes.text(0.42, 0.41, "enough", color=GREEN, fontsize=9.5, ha="center")
    axes.text(0.13, 0.62, "too much: the step is short", color=BLUE, fontsize=9.5, va="center")
    axes.set(xlim=(-0.02, 1.5), ylim=(-0.2, 1.2))
    axes.axis("off")


def draw() -> Figure:
    """The round at the left, the model at the right."""
    picture, axes = canvas(14.2, 4.9)
    round_of_search(axes)
    damping(picture.add_axes((0.63, 0.03, 0.36, 0.95)))
    return picture


if __name__ == "__main__":
    save(draw(), "concepts/search.svg")
