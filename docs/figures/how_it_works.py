"""Draw docs/how-it-works.svg: what 2:4 drops, how an order of the channels saves it, and where the order goes.

python docs/figures/how_it_works.py [OUT.svg | OUT.png]
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from style import BLUE, GRAY, ORANGE, save

WEIGHTS = (0.95, 0.85, 0.80, 0.75, 0.12, 0.22, 0.18, 0.10)  # magnitudes of one row, by channel
ORDER = (0, 4, 1, 6, 2, 5, 3, 7)
CELL = 0.46
HEIGHT = 1.9


def survivors(order: tuple[int, ...]) -> set[int]:
    """The channels whose weight is among the two largest of its group of four."""
    groups = (order[start : start + 4] for start in range(0, 8, 4))
    return {channel for group in groups for channel in sorted(group, key=lambda c: -WEIGHTS[c])[:2]}


def row(axes: Axes, left: float, base: float, order: tuple[int, ...]) -> None:
    """One row of weights as bars: full when kept, dashed outlines when dropped, boxes round the groups."""
    kept = survivors(order)
    for place, channel in enumerate(order):
        x = left + place * CELL + (0.3 if place >= 4 else 0.0)
        color = BLUE if channel in kept else ORANGE
        bar = Rectangle((x + 0.06, base), CELL - 0.12, HEIGHT * WEIGHTS[channel], edgecolor=color, linewidth=1.4)
        bar.set_facecolor(color if channel in kept else "none")
        bar.set_linestyle("-" if channel in kept else (0, (2, 1.5)))
        axes.add_patch(bar)
        axes.text(x + CELL / 2, base - 0.12, str(channel + 1), ha="center", va="top", color=GRAY, fontsize=10)
    for start in (0.0, 4 * CELL + 0.3):
        box = Rectangle((left + start - 0.04, base - 0.45), 4 * CELL + 0.08, HEIGHT + 0.5, linewidth=1)
        box.set(edgecolor=GRAY, facecolor="none", alpha=0.6)
        axes.add_patch(box)


def fold(axes: Axes, left: float, base: float) -> None:
    """The rows of the layer before, each led to the column that reads it, both in the new order."""
    cell, depth = 0.24, 1.0
    corner = left + depth + 0.55, base + 8 * cell + 0.42
    for place, channel in enumerate(ORDER):
        color = BLUE if WEIGHTS[channel] > 0.5 else GRAY
        y = base + (7.5 - place) * cell
        x = corner[0] + (place + 0.5) * cell
        axes.add_patch(Rectangle((left, y - 0.4 * cell), depth, 0.8 * cell, facecolor=color, linewidth=0))
        axes.add_patch(Rectangle((x - 0.4 * cell, corner[1]), 0.8 * cell, depth, facecolor=color, linewidth=0))
        axes.plot([left + depth + 0.27, x, x], [y, y, corner[1] - 0.04], color=color, linewidth=1, alpha=0.8)
        axes.text(left + depth + 0.14, y, str(channel + 1), ha="center", va="center", color=GRAY, fontsize=8)
    axes.text(left, base - 0.12, "rows of the\nlayer before", va="top", color=GRAY, fontsize=10)
    middle = corner[1] + depth / 2
    axes.text(corner[0] - 0.12, middle, "columns of\nthis layer", ha="right", va="center", color=GRAY, fontsize=10)


def draw() -> Figure:
    """The whole picture."""
    picture = Figure(figsize=(10.9, 3.95))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14.2), ylim=(0.05, 5.2))
    axes.axis("off")
    starts = (0.3, 5.3, 10.5)
    titles = ("2:4 keeps two of every four", "Reorder the channels", "Fold it into the weights")
    details = (
        "Large weights share a group: 3 and 4 are lost.",
        "Now the same rule keeps all four large weights.",
        "The rows before move along, at no cost.",
    )
    for number, (x, title, detail) in enumerate(zip(starts, titles, details, strict=True), start=1):
        axes.text(x, 4.9, f"{number}  {title}", va="top", color=GRAY, fontsize=13, weight="bold")
        axes.text(x, 4.47, detail, va="top", color=GRAY, fontsize=10)
    row(axes, starts[0], 1.5, tuple(range(8)))
    row(axes, starts[1], 1.5, ORDER)
    fold(axes, starts[2], 0.75)
    arrow = {"arrowstyle": "-|>", "color": GRAY, "linewidth": 1.6, "mutation_scale": 16}
    for start, end in ((4.5, 5.15), (9.55, 10.2)):
        axes.annotate("", (end, 2.3), (start, 2.3), arrowprops=arrow)
    legend(axes, starts[0], 0.45)
    return picture


def legend(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Rectangle((x, y), 0.2, 0.28, facecolor=BLUE, edgecolor=BLUE, linewidth=1.4))
    dropped = Rectangle((x + 1.3, y), 0.2, 0.28, facecolor="none", edgecolor=ORANGE, linewidth=1.4)
    dropped.set_linestyle((0, (2, 1.5)))
    axes.add_patch(dropped)
    for offset, text in ((0.32, "kept"), (1.62, "dropped"), (3.1, "bar height: size of the weight; number: channel")):
        axes.text(x + offset, y + 0.14, text, va="center", color=GRAY, fontsize=10)


if __name__ == "__main__":
    save(draw(), "how-it-works.svg")
