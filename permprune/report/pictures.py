"""The three pictures of a run: its result beside the dense model's, the search, and the error of each layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from permprune.report.style import BLUE, GRAY, ORANGE, WIDTH, figure, horizontal_bars, legend, styled
from permprune.report.words import better

Record = Mapping[str, Any]
Points = list[tuple[int, float, float]]

COLUMNS = 2


@styled
def output_error(layers: Sequence[Record]) -> Figure:
    """Draw the squared error of each layer's output relative to the output, in natural order and as permuted.

    Each kind of linear layer has a panel of its own; all panels have the same scale.
    """
    kinds = layer_kinds(layers, "error_none", "error")
    rows = math.ceil(len(kinds) / COLUMNS)
    picture = figure(WIDTH, 0.75 + 1.15 * rows)
    grid = list(picture.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, points) in zip(grid, kinds.items(), strict=False):
        index, first, second = (list(column) for column in zip(*points, strict=True))
        axes.fill_between(index, first, second, color=BLUE, alpha=0.18, linewidth=0)
        marker = {"marker": "o" if len(index) == 1 else "", "markersize": 3}
        axes.plot(index, first, color=ORANGE, linewidth=1.1, linestyle=(0, (4, 1.5)), label="natural order", **marker)
        axes.plot(index, second, color=BLUE, linewidth=1.5, label="permuted", **marker)
        axes.set_title(name if len(name) <= 30 else f"…{name[-29:]}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
    for axes in grid[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[len(kinds) - COLUMNS : len(kinds)]:
        axes.tick_params(labelbottom=True)
    picture.supxlabel("layer", fontsize=9)
    legend(picture, grid[0].get_legend_handles_labels()[0], 2)
    return picture


@styled
def learning_curve(curve: Sequence[Record]) -> Figure:
    """Draw the held-out loss over time; rejected rounds are crosses, or triangles at the top if off the scale."""
    kept = [point for point in curve if point["kept"] and math.isfinite(point["loss"])]
    rejected = [point for point in curve if not point["kept"]]
    picture = figure(WIDTH, 2.5)
    axes = picture.subplots()
    losses = [point["loss"] for point in kept]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    spread = (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = low - 0.12 * spread, high + 0.2 * spread
    axes.set_ylim(bottom, top)
    axes.plot([point["seconds"] for point in kept], losses, color=BLUE, marker="o", markersize=4, label="accepted")
    inside = [point for point in rejected if point["loss"] <= top]
    beyond = [point for point in rejected if not point["loss"] <= top]
    for points, marker, label in ((inside, "x", "rejected"), (beyond, "^", "rejected, off the scale")):
        if points:
            seconds, heights = [point["seconds"] for point in points], [min(point["loss"], top) for point in points]
            axes.plot(seconds, heights, marker, color=ORANGE, markersize=6, clip_on=False, label=label)
    axes.set_xlabel("seconds of search")
    axes.set_ylabel("held-out loss")
    axes.grid(axis="y")
    legend(picture, axes.get_legend_handles_labels()[0], 3)
    return picture


@styled
def bars(dense: float, none: float, pruned: float, metric: str, method: str) -> Figure:
    """Draw bars of three values of a metric: dense, pruned in natural order, and pruned as permuted by `method`."""
    name = method.partition(":")[0]  # its options would leave the bars no room
    names = ["dense", "pruned,\nnatural order", f"pruned,\n{name}"]
    picture = figure(WIDTH, 2.5)
    axes = picture.subplots()
    horizontal_bars(axes, names, [dense, none, pruned], [GRAY, ORANGE, BLUE])
    axes.set_xlabel(f"{metric} ({better(metric)})")
    return picture


def layer_kinds(layers: Sequence[Record], before: str, after: str) -> dict[str, Points]:
    """Group the linear layers by kind; returns (layer index, before, after) of each.

    The kind is the last part of a layer's name, or as many parts as distinguish it from other kinds. The index is the
    first number in the name. Linear layers with the same kind and index, such as experts, are averaged.
    """
    values: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        parts = layer["name"].split(".")
        index = next((int(part) for part in parts if part.isdecimal()), 0)
        path = ".".join(part for part in parts if not part.isdecimal())
        values[path][index].append((layer[before], layer[after]))
    labels = _short_names(list(values))
    return {labels[path]: [_mean(index, values[path][index]) for index in sorted(values[path])] for path in values}


def _mean(index: int, pairs: list[tuple[float, float]]) -> tuple[int, float, float]:
    return index, sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs)


def _short_names(paths: list[str]) -> dict[str, str]:
    """Return the shortest ending of each dotted path that no other path ends in."""
    names = {}
    for path in paths:
        parts = path.split(".")
        endings = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        names[path] = next(
            (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in paths if other != path)),
            path,
        )
    return names
