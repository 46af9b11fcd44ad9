"""The pictures of a sweep: the metric against model size, and against the time of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from permprune.evaluation.result import metric_named
from permprune.report.pictures import dense_line, metric_axis
from permprune.report.style import GRAY, MARKERS, PALETTE, WIDTH, figure, legend, styled

Result = Mapping[str, Any]

TICKS = {1: "1 s", 10: "10 s", 60: "1 min", 300: "5 min", 1200: "20 min", 3600: "1 h", 14400: "4 h", 57600: "16 h"}
"""Ticks of the time axis: seconds and their labels."""

SCORE = "score"
"""The key of the mean score on tasks, in rows that have one."""

SCORE_NAME = "mean task score"

COLUMNS = 4
"""Number of columns of a legend."""


@styled
def pareto(result: Result, values: Sequence[str]) -> Figure:
    """Draw `values`, the metric and `SCORE`, of every cell against its size, each in a panel of its own."""
    colors, markers = _keys(result)
    picture = figure(WIDTH * len(values), 3.6)
    for axes, value in zip(picture.subplots(1, len(values), squeeze=False).flat, values, strict=True):
        _against_size(axes, result, value)
    _legend(picture, colors, markers)
    return picture


def _against_size(axes: Axes, result: Result, value: str) -> None:
    """Draw a value of every cell against its size; a line joins the cells on the Pareto front."""
    rows, best = _finite(result, value), "score_front" if value == SCORE else "front"
    colors, markers = _keys(result)
    front = sorted((row["size"], row[value]) for row in rows if row[best])
    axes.plot(*zip(*front, strict=True), color=GRAY, linewidth=1.0, zorder=1) if front else None
    for row in rows:
        axes.plot(
            row["size"],
            row[value],
            color=colors[row["method"]],
            marker=markers[row["pattern"]],
            markersize=7 if row[best] else 5.5,
            alpha=1.0 if row[best] else 0.75,
            linestyle="",
        )
    _dense(axes, result, value)
    axes.set_xlabel("size, share of the dense model (smaller is better)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid()


@styled
def minutes(result: Result) -> Figure:
    """Draw the metric of every cell against the time of its search, with a line at the best so far for each pattern."""
    metric = result["metric"]
    rows = _finite(result, metric)
    sign = -1 if metric_named(metric).higher_is_better else 1
    colors, markers = _keys(result)
    picture = figure(WIDTH, 3.6)
    axes = picture.subplots()
    axes.set_xscale("log")
    for pattern, marker in markers.items():
        cells = sorted((row for row in rows if row["pattern"] == pattern), key=lambda row: float(row["seconds"]))
        best = [sign * min(sign * row[metric] for row in cells[: end + 1]) for end in range(len(cells))]
        seconds = [max(1.0, row["seconds"]) for row in cells]
        axes.plot(seconds, best, color=GRAY, linewidth=0.8, drawstyle="steps-post", zorder=1)
        for row, second in zip(cells, seconds, strict=True):
            axes.plot(second, row[metric], color=colors[row["method"]], marker=marker, markersize=6)
    _dense(axes, result, metric)
    axes.set_xlabel("time of the search (log scale)")
    low, high = axes.get_xlim()
    ticks = {seconds: label for seconds, label in TICKS.items() if low <= seconds <= high}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid()
    _legend(picture, colors, markers)
    return picture


def _finite(result: Result, value: str) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if math.isfinite(row[value])]


def _keys(result: Result) -> tuple[dict[str, str], dict[str, str]]:
    """Return a colour for each method and a marker for each pattern, in the order of the rows."""
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    shapes = dict.fromkeys(row["pattern"] for row in result["rows"])
    colors = {method: PALETTE[place % len(PALETTE)] for place, method in enumerate(methods)}
    return colors, {pattern: MARKERS[place % len(MARKERS)] for place, pattern in enumerate(shapes)}


def _dense(axes: Axes, result: Result, value: str) -> None:
    """Draw a horizontal line at the dense model's value, and label the axis of the value."""
    dense = result["dense"][value]
    dense_line(axes, dense)
    values = [dense, *(row[value] for row in _finite(result, value))]
    metric_axis(axes, "y", SCORE_NAME if value == SCORE else value, values)


def _legend(picture: Figure, colors: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """Draw a legend of methods by colour and of patterns by marker, in separate rows."""
    lines = [Line2D([], [], color=color, linewidth=4, label=name) for name, color in colors.items()]
    shapes = [Line2D([], [], color=GRAY, marker=shape, linestyle="", label=name) for name, shape in markers.items()]
    blank = Line2D([], [], linestyle="", label=" ")
    rows = [
        [*kind[start : start + COLUMNS], *[blank] * (start + COLUMNS - len(kind))]
        for kind in (lines, shapes)
        for start in range(0, len(kind), COLUMNS)
    ]
    handles = [handle for column in zip(*rows, strict=True) for handle in column]
    legend(picture, handles, COLUMNS, handlelength=1.2, columnspacing=1.2)
