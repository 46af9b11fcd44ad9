"""The pictures of a run and of a comparison, as SVG or PNG bytes that are legible on light and dark pages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from permprune.evaluation.result import metric_named
from permprune.report.style import BLUE, GRAY, ORANGE, WIDTH, Format, figure, quiet, save
from permprune.report.words import better, duration, number, percent

Record = Mapping[str, Any]
Points = list[tuple[int, float, float]]

COLUMNS = 2


def output_error(layers: Sequence[Record], kind: Format = "svg") -> bytes:
    """Draw the squared error of each layer's output relative to the output, in natural order and as permuted."""
    return _by_kind(layers, "error_none", "error", kind)


def learning_curve(curve: Sequence[Record], kind: Format = "svg") -> bytes:
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
    quiet(axes)
    picture.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=GRAY)
    return save(picture, kind)


def epochs(curve: Sequence[Record], metric: str, dense: float | None, kind: Format = "svg") -> bytes:
    """Draw a metric before training and after each epoch, with a line at the dense model's value if that is given."""
    picture = figure(WIDTH, 2.5)
    axes = picture.subplots()
    values = [point["value"] for point in curve]
    axes.plot([point["epoch"] for point in curve], values, color=BLUE, marker="o", markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs")
    metric_axis(axes, "y", metric, values if dense is None else [*values, dense])
    if dense is not None:
        dense_line(axes, dense)
    quiet(axes)
    return save(picture, kind)


def dense_line(axes: Axes, value: float) -> None:
    """Draw a horizontal line at the value of the dense model."""
    axes.axhline(value, color=GRAY, linewidth=1.0, linestyle=(0, (4, 2)), zorder=0)
    axes.annotate(
        "dense", (1.0, value), (3, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        va="center", color=GRAY, fontsize=8,
    )  # fmt: skip


def bars(dense: float, none: float, pruned: float, metric: str, method: str, kind: Format = "svg") -> bytes:
    """Draw bars of three values of a metric: dense, pruned in natural order, and pruned as permuted by `method`."""
    labels = ["dense", "pruned,\nnatural order", f"pruned,\n{method}"]
    values = [dense, none, pruned]
    picture = figure(WIDTH, 2.5)
    axes = picture.subplots()
    lengths = [value if math.isfinite(value) else 0.0 for value in values]
    drawn = axes.barh(range(3), lengths, color=[GRAY, ORANGE, BLUE], height=0.62)
    axes.bar_label(drawn, [number(value) for value in values], padding=4, color=GRAY, fontsize=9)
    axes.set_yticks(range(3), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(lengths) or 1.0)
    axes.set_xlabel(f"{metric} ({better(metric)})")
    quiet(axes, "x")
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    return save(picture, kind)


def comparison(rows: Sequence[Record], metric: str, title: str = "", kind: Format = "svg") -> bytes:
    """Draw a metric by method, the best first, with columns for the share of the gap closed and the time.

    Perplexities are on a log scale.
    """
    sign = -1 if metric_named(metric).higher_is_better else 1
    ordered = sorted(rows, key=lambda row: sign * row[metric] if math.isfinite(row[metric]) else math.inf)
    picture = figure(7.4, 1.3 + 0.34 * len(ordered))
    axes, margin = picture.subplots(1, 2, sharey=True, width_ratios=(3, 1.35))
    margin.axis("off")
    metric_axis(axes, "x", metric, [row[metric] for row in ordered])
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    _cells(margin, -0.8, [metric, "gap closed", "time"])
    for place, row in enumerate(ordered):
        color = {"dense": GRAY, "none": ORANGE}.get(row["method"], BLUE)
        axes.plot(row[metric], place, color=color, marker="o", markersize=8)
        _cells(margin, place, [number(row[metric]), percent(row["gap_closed"]), duration(row["seconds"])])
    axes.set_yticks(range(len(ordered)), [row["method"] for row in ordered])
    quiet(axes, "both")
    axes.tick_params(axis="y", length=0, labelsize=9)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    if title:
        heading = picture.suptitle(title, x=0.01, ha="left", color=GRAY, fontsize=10)
        heading.set_parse_math(False)
    return save(picture, kind)


def metric_axis(axes: Axes, side: Literal["x", "y"], metric: str, values: Sequence[float]) -> None:
    """Label an axis that shows a metric's values; perplexities are on a log scale."""
    label, apart = metric, "\n" if side == "y" else " "
    if metric == "perplexity":
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        axes.set(**{f"{side}scale": "log", f"{side}lim": (min(finite) / 1.12, max(finite) * 1.12)})
        _plain_ticks(axes.xaxis if side == "x" else axes.yaxis)
        label = f"{metric}, log scale"
    axes.set(**{f"{side}label": f"{label}{apart}({better(metric)})"})


def layer_kinds(layers: Sequence[Record], before: str, after: str) -> dict[str, Points]:
    """Group the linear layers by kind; returns (layer index, before, after) of each.

    The kind is the last part of a layer's name, or as many parts as distinguish it from other kinds. The index is the
    first number in the name. Linear layers with the same kind and index, such as experts, are averaged.
    """
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        parts = layer["name"].split(".")
        index = next((int(part) for part in parts if part.isdecimal()), 0)
        path = ".".join(part for part in parts if not part.isdecimal())
        found[path][index].append((layer[before], layer[after]))
    labels = _short_names(list(found))
    return {labels[path]: [_mean(index, found[path][index]) for index in sorted(found[path])] for path in found}


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


def _by_kind(layers: Sequence[Record], before: str, after: str, kind: Format) -> bytes:
    """Draw a small panel for each kind of linear layer; all panels have the same scale."""
    kinds = layer_kinds(layers, before, after)
    rows = math.ceil(len(kinds) / COLUMNS)
    picture = figure(WIDTH, 0.75 + 1.15 * rows)
    grid = list(picture.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (name, points) in zip(grid, kinds.items(), strict=False):
        index, first, second = (list(column) for column in zip(*points, strict=True))
        axes.fill_between(index, first, second, color=BLUE, alpha=0.18, linewidth=0)
        marker = "o" if len(index) == 1 else ""
        axes.plot(index, first, color=ORANGE, linewidth=1.1, linestyle=(0, (4, 1.5)), marker=marker, markersize=3)
        axes.plot(index, second, color=BLUE, linewidth=1.5, marker=marker, markersize=3)
        title = name if len(name) <= 30 else f"…{name[-29:]}"
        axes.set_title(title, loc="left", pad=3, color=GRAY, fontsize=9, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        quiet(axes)
    for axes in grid[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[len(kinds) - COLUMNS : len(kinds)]:
        axes.tick_params(labelbottom=True)
    _by_kind_labels(picture)
    return save(picture, kind)


def _by_kind_labels(picture: Figure) -> None:
    picture.supxlabel("layer", color=GRAY, fontsize=9)
    handles = [
        Line2D([], [], color=ORANGE, linewidth=1.1, linestyle=(0, (4, 1.5))),
        Line2D([], [], color=BLUE, linewidth=1.5),
    ]
    labels = ["natural order", "permuted"]
    picture.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=GRAY)


def _cells(axes: Axes, height: float, cells: list[str]) -> None:
    """Write three right-aligned cells at a height in data units."""
    for place, cell in zip((0.3, 0.7, 1.0), cells, strict=True):
        transform = axes.get_yaxis_transform()
        axes.text(place, height, cell, transform=transform, ha="right", va="center", color=GRAY, fontsize=9)


def _plain_ticks(axis: Axis) -> None:
    """Set ticks at 1, 2 and 5 times the powers of ten, or evenly spaced ones if the range is too short for these."""
    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


__all__ = ["bars", "comparison", "dense_line", "layer_kinds", "learning_curve", "metric_axis", "output_error"]
