"""The style of all pictures: gray axes on a transparent background, and colours that are safe for the colour-blind.

The colours are those of Okabe & Ito, lightened or darkened until each stands out on white as well as on near-black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from permprune.report.words import number

GRAY = "#757b82"
BLUE = "#2b87c8"
ORANGE = "#d9700f"

PALETTE = (ORANGE, BLUE, "#16966f", "#b5649a", "#9a7b0a", "#7d6fd0", "#c0504d", "#4f9aa8", GRAY)
"""Colours of methods, in the order of the methods; no permutation is the first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Markers of patterns, in the order of the patterns."""

WIDTH = 4.4
"""Width of a picture in inches: its text stays legible when a page shrinks it to the width of a phone."""

_RC: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GRAY),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 3),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "axes.titlelocation": "left",
    "axes.titlepad": 3,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": GRAY,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "svg.hashsalt": "permprune",
    "svg.fonttype": "path",
}

styled = matplotlib.rc_context(_RC)
"""A decorator of functions that draw in this style."""


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, which uses no global state of matplotlib."""
    return Figure(figsize=(width, height), layout="constrained")


def legend(picture: Figure, handles: Sequence[Artist], columns: int, **options: Any) -> None:
    """Draw a legend above a picture's axes."""
    picture.legend(handles=handles, loc="outside upper left", ncols=columns, **options)


def horizontal_bars(axes: Axes, names: Sequence[str], values: Sequence[float], colors: Sequence[str]) -> None:
    """Draw horizontal bars, the first at the top, each with its name at the axis and its value at its end."""
    lengths = [value if math.isfinite(value) else 0.0 for value in values]
    drawn = axes.barh(range(len(names)), lengths, color=colors, height=0.62)
    axes.bar_label(drawn, [number(value) for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(lengths) or 1.0)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)


@styled
def save(picture: Figure) -> bytes:
    """Return a picture as SVG; the same picture always gives the same bytes."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
