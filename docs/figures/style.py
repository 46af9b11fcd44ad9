"""What the pictures share: colours that are readable on light and dark pages, boxes, arrows, and saving."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

GRAY, BLUE, ORANGE, GREEN, PURPLE, RED = "#7d848c", "#2b87c8", "#d9700f", "#3f9d55", "#9a6fd0", "#d0507a"

DOCS = Path(__file__).parents[1]


def canvas(width: float, height: float, scale: float = 0.77) -> tuple[Figure, Axes]:
    """A picture and its axes in units of about two lines of text, (0, 0) at the lower left; without ticks."""
    picture = Figure(figsize=(width * scale, height * scale))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return picture, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, *, color: str = GRAY) -> None:
    """A rounded box round a text; (x, y) is its lower left corner."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1.3)
    shape.set(edgecolor=color, facecolor="none")
    axes.add_patch(shape)
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", color=color, fontsize=9.5, linespacing=1.35
    )


def strip(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, linewidth=0))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GRAY, bend: float = 0) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.3, "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})


def label(
    axes: Axes, x: float, y: float, text: str, size: float = 9.5, *, color: str = GRAY, bold: bool = False
) -> None:
    """A text whose upper left corner is (x, y)."""
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, va="top", color=color, fontsize=size, weight=weight, linespacing=1.4)


def save(picture: Figure, name: str) -> None:
    """Write the picture to docs/`name`, or to the path on the command line; the same bytes each time."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / name
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "permprune", "svg.fonttype": "path"}):
        picture.savefig(path, transparent=True, dpi=110, metadata=metadata)
