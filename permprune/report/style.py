"""How every picture looks: gray axes on a transparent ground, and colours that colour-blind readers can tell apart.

The colours are of Okabe & Ito's set, lightened or darkened until each stands out on white as well as on near-black.
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
"""Colours of methods, in their order: that of no permutation first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Shapes of patterns, in their order."""

WIDTH = 4.4
"""Inches: lettering stays legible when the page shrinks a picture to the width of a phone."""


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, drawn without any global state."""
    return Figure(figsize=(width, height), layout="constrained")


def quiet(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Gray axes without a box, and a faint grid along one direction."""
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
    """No box, no ticks, no ground."""
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)


def save(picture: Figure, kind: Format) -> bytes:
    """The file's bytes; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "permprune", "svg.fonttype": "path"}):
        picture.savefig(buffer, format=kind, dpi=200, transparent=True, metadata=metadata)
    return buffer.getvalue()
