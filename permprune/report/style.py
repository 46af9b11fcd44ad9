"""The style of all pictures: gray axes on a transparent background, and colours that are safe for the colour-blind.

The colours are those of Okabe & Ito, lightened or darkened until each stands out on white as well as on near-black.
"""

from __future__ import annotations

import io
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Format = Literal["svg", "png"]

GRAY = "#757b82"
BLUE = "#2b87c8"
ORANGE = "#d9700f"

PALETTE = (ORANGE, BLUE, "#16966f", "#b5649a", "#9a7b0a", "#7d6fd0", "#c0504d", "#4f9aa8", GRAY)
"""Colours of methods, in the order of the methods; no permutation is the first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Markers of patterns, in the order of the patterns."""

WIDTH = 4.4
"""Width of a picture in inches: its text stays legible when a page shrinks it to the width of a phone."""


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, which uses no global state of matplotlib."""
    return Figure(figsize=(width, height), layout="constrained")


def quiet(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Make axes gray and remove their box, and draw a faint grid."""
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(which="both", colors=GRAY, labelsize=8, length=3)
    axes.grid(axis=grid, color=GRAY, alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(GRAY)
        label.set_fontsize(9)


def bare(axes: Axes) -> None:
    """Remove the box, the ticks and the background of axes."""
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)


def save(picture: Figure, kind: Format) -> bytes:
    """Return the bytes of the file; the same picture always gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "permprune", "svg.fonttype": "path"}):
        picture.savefig(buffer, format=kind, dpi=200, transparent=True, metadata=metadata)
    return buffer.getvalue()
