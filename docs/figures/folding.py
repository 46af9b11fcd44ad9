"""Draw docs/concepts/folding.svg: which edges of a block's weights follow which order, in fold and in gather mode.

python docs/figures/folding.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, arrow, box, canvas, label, save, strip

WIDTH, HEIGHT, EDGE = 1.0, 0.62, 0.13
QKV, ATTENTION, OUT, MLP, DOWN = 3.85, 5.2, 6.25, 10.75, 12.45
"""Where the columns of weights begin."""


def weight(axes: Axes, x: float, y: float, name: str, inputs: str, outputs: str) -> None:
    """A weight: the colour at its left is the order of its input channels, that at its right of its output channels."""
    box(axes, x, y, WIDTH, HEIGHT, name)
    strip(axes, x, y + 0.05, EDGE, HEIGHT - 0.1, inputs)
    strip(axes, x + WIDTH - EDGE, y + 0.05, EDGE, HEIGHT - 0.1, outputs)


def block(axes: Axes, base: float, stream: str, attention: str, mlp: str, *, gathers: bool) -> None:
    """One block on the residual stream, whose order has the colour `stream`; the others are those its linears read."""
    top, middle = base + 3.2, base + 1.36
    axes.plot([0.3, 14.4], [top, top], color=stream, linewidth=3.5, solid_capstyle="round")
    label(axes, 0.3, top + 0.42, "residual stream")
    for norm, readers, reads, rows in ((0.95, QKV, attention, (2.0, 1.05, 0.1)), (8.0, MLP, mlp, (1.55, 0.55))):
        axes.plot([norm - 0.4, norm - 0.4], [top, middle], color=stream, linewidth=1.3)
        arrow(axes, (norm - 0.4, middle), (norm - 0.02, middle), stream)
        box(axes, norm, base + 1.05, 0.8, HEIGHT, "norm")
        if gathers:
            box(axes, norm + 1.02, base + 1.05, 0.9, HEIGHT, "gather", color=reads)
            arrow(axes, (norm + 0.8, middle), (norm + 1.0, middle), stream)
        for y in rows:
            start = norm + (1.94 if gathers else 0.82)
            arrow(axes, (start, middle), (readers - 0.03, base + y + HEIGHT / 2), reads)
    box(axes, ATTENTION, base + 0.1, 0.5, 2.52, "")
    axes.text(ATTENTION + 0.25, middle, "attention", rotation=90, ha="center", va="center", color=GRAY, fontsize=9.5)
    for y, name, outputs in ((2.0, "q", GRAY), (1.05, "k", GRAY), (0.1, "v", ORANGE)):
        weight(axes, QKV, base + y, name, attention, outputs)
        arrow(axes, (QKV + WIDTH, base + y + HEIGHT / 2), (ATTENTION - 0.02, base + y + HEIGHT / 2), outputs)
    arrow(axes, (ATTENTION + 0.5, middle), (OUT - 0.03, middle), ORANGE)
    weight(axes, OUT, base + 1.05, "o", ORANGE, stream)
    for y, name in ((1.55, "gate"), (0.55, "up")):
        weight(axes, MLP, base + y, name, mlp, BLUE)
        arrow(axes, (MLP + WIDTH, base + y + HEIGHT / 2), (DOWN - 0.03, middle), BLUE)
    weight(axes, DOWN, base + 1.05, "down", BLUE, stream)
    for x in (OUT, DOWN):
        axes.plot([x + WIDTH, x + WIDTH + 0.14], [middle, middle], color=stream, linewidth=1.3)
        arrow(axes, (x + WIDTH + 0.14, middle), (x + WIDTH + 0.14, top - 0.05), stream)


def draw() -> Figure:
    """Both modes, one above the other."""
    picture, axes = canvas(14.7, 9.4)
    label(axes, 0.3, 9.3, "Fold mode: one order for the residual stream of the whole network", 12, bold=True)
    block(axes, 5.1, GREEN, GREEN, GREEN, gathers=False)
    label(axes, 0.3, 4.75, "Gather mode: an order of its own after each norm", 12, bold=True)
    block(axes, 0.55, GRAY, PURPLE, RED, gathers=True)
    legend = "Left edge of a weight: its input channels; right edge: its output channels. One colour is one order, "
    label(axes, 0.3, 0.35, legend + "gray the natural one.")
    return picture


if __name__ == "__main__":
    save(draw(), "concepts/folding.svg")
