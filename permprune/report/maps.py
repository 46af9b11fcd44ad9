"""Heat maps: kept saliency and patterns by layer, and a few weights before and after reordering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from permprune.pattern import DENSE, Pattern
from permprune.report.pictures import layer_kinds
from permprune.report.style import BLUE, ORANGE, WIDTH, bare, figure, legend, styled

Record = Mapping[str, Any]

NAME = 24
"""Largest number of characters of a row's name; longer names lose their beginning."""

FAINT = 0.06
"""The opacity of the lowest value, so that its cell is still visible."""


@styled
def kept_saliency(layers: Sequence[Record]) -> Figure:
    """Draw the share of the squared saliency that the mask keeps, in natural order and as permuted.

    Rows are the kinds of linear layers, columns the layers.
    """
    kinds = layer_kinds(layers, "kept_none", "kept")
    before, after = (_grid(kinds, place) for place in (1, 2))
    values = np.concatenate([before, after])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low < 1e-9:
        low, high = low - 0.01, high + 0.01
    picture = figure(WIDTH, 1.15 + 0.36 * len(kinds))
    panels = picture.subplots(2, 1, sharex=True)
    for axes, grid, title in zip(panels, (before, after), ("natural order", "permuted"), strict=True):
        cells = axes.pcolormesh(grid, cmap=_ramp(BLUE), vmin=low, vmax=high, edgecolors="none")
        axes.set_title(title)
        _rows(axes, list(kinds))
    _columns(panels[1], before.shape[1])
    bar = picture.colorbar(cells, ax=panels, aspect=30, pad=0.02, format=FuncFormatter(lambda x, _: f"{x:.0%}"))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.locator = MaxNLocator(4)
    return picture


@styled
def patterns(layers: Sequence[Record]) -> Figure:
    """Draw the pattern of each layer, with a stronger colour for denser patterns.

    Rows are the kinds of linear layers, columns the layers.
    """
    density = {
        text: 1.0 if text == DENSE else Pattern.parse(text).density for text in {one["pattern"] for one in layers}
    }
    shares = [{"name": layer["name"], "kept": density[layer["pattern"]]} for layer in layers]
    kinds = layer_kinds(shares, "kept", "kept")
    picture = figure(WIDTH, 0.9 + 0.19 * len(kinds))
    axes = picture.subplots()
    grid = _grid(kinds, 1)
    most = float(np.nanmax(grid))
    axes.pcolormesh(grid, cmap=_ramp(BLUE), vmin=0.0, vmax=most, edgecolors="none")
    _rows(axes, list(kinds))
    _columns(axes, grid.shape[1])
    names = sorted(density, key=lambda text: density[text])
    handles = [Patch(facecolor=_ramp(BLUE)(density[text] / most), label=text) for text in names]
    legend(picture, handles, 6)
    return picture


@styled
def sample(cells: Record) -> Figure:
    """Draw a few weights of a layer in natural order and as permuted: kept ones blue, pruned ones orange."""
    picture = figure(WIDTH, 3.4)
    panels = picture.subplots(2, 1)
    for axes, key, title in zip(panels, ("natural", "permuted"), ("natural order", "permuted"), strict=True):
        score, kept = (np.array(cells[key][what]) for what in ("score", "kept"))
        colors = np.where(kept[:, :, None] > 0, to_rgba(BLUE), to_rgba(ORANGE))
        colors[:, :, 3] = FAINT + (1 - FAINT) * score / 100
        gap = np.arange(score.shape[1]) // cells["m"] * 0.35
        for column, offset in enumerate(gap):
            strip = [column + offset, column + offset + 1]
            axes.pcolormesh(strip, np.arange(len(score) + 1), colors[:, column : column + 1], edgecolors="none")
        bare(axes)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_title(title)
    handles = [Patch(facecolor=color, label=label) for color, label in ((BLUE, "kept"), (ORANGE, "pruned"))]
    legend(picture, handles, 2)
    return picture


def _grid(kinds: Mapping[str, Sequence[tuple[int, float, float]]], place: int) -> np.ndarray:
    """Return number `place` of every point as an array (kinds, layers); NaN if a layer lacks a kind."""
    width = 1 + max(point[0] for points in kinds.values() for point in points)
    grid = np.full((len(kinds), width), math.nan)
    for row, points in enumerate(kinds.values()):
        for point in points:
            grid[row, point[0]] = point[place]
    return grid


def _ramp(color: str) -> LinearSegmentedColormap:
    """A colour map from almost transparent to the full colour, for light and dark backgrounds."""
    rgb = to_rgba(color)[:3]
    return LinearSegmentedColormap.from_list("ramp", [(*rgb, FAINT), (*rgb, 1.0)])


def _rows(axes: Axes, names: Sequence[str]) -> None:
    bare(axes)
    shown = [name if len(name) <= NAME else f"…{name[1 - NAME :]}" for name in names]
    axes.set_yticks([row + 0.5 for row in range(len(names))], shown)
    axes.tick_params(axis="y", labelleft=True)
    axes.invert_yaxis()


def _columns(axes: Axes, count: int) -> None:
    step = max(1, math.ceil(count / 8))
    axes.set_xticks([place + 0.5 for place in range(0, count, step)], [str(place) for place in range(0, count, step)])
    axes.tick_params(axis="x", labelbottom=True)
    axes.set_xlabel("layer")
