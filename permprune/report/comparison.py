"""A comparison as a table for the terminal, and as a page: a sentence, a picture of the trade-off, all cells.

A cell is the result of one combination of pattern, method and time budget.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from rich.table import Table

from permprune.evaluation.result import metric_named
from permprune.report.page import data_uri, fill
from permprune.report.style import GRAY, MARKERS, PALETTE, WIDTH, figure, legend, styled
from permprune.report.words import (
    NONE,
    better,
    columns,
    count,
    duration,
    fine_percent,
    number,
    outcome,
    overlap_note,
    percent,
    way,
    whole,
)
from permprune.system.files import write_whole

Result = Mapping[str, Any]

COLUMNS = 4
"""Number of columns of a legend."""


def render_comparison(result: Result) -> str:
    """Render the page for the contents of a comparison's figures.json. Everything in it is escaped."""
    metric, dense = result["metric"], result["dense"]
    return fill(
        "comparison.html",
        model=result["model"],
        version=importlib.metadata.version("permprune"),
        title=f"{result['model']}, comparison",
        decision=comparison_decision(result),
        note=result["note"],
        overlap=overlap_note(result["measured"]["overlap"]),
        metric=metric,
        dense=dense,
        front=sorted(_front(result), key=lambda row: float(row["size"])),
        groups=_groups(result),
        picture=data_uri(pareto(result)),
        measured=result["measured"],
        settings=result["settings"],
    )


def write_comparison(result: Result, folder: Path) -> None:
    """Write report.html to a folder. Raises `PermpruneError` if it cannot be written."""
    page = render_comparison(result)
    write_whole(folder / "report.html", lambda temporary: temporary.write_text(page, encoding="utf-8"))


def comparison_decision(result: Result) -> str:
    """Summarise the result of a comparison in one sentence: the cell with the best metric, and its size."""
    metric, rows = result["metric"], result["rows"]
    if not (front := _front(result)):
        return f"None of {count(len(rows), 'cell')} has a finite {metric}."
    best = min(front, key=lambda row: metric_named(metric).cost(row[metric]))
    none = next(row for row in rows if row["pattern"] == best["pattern"] and row["method"] == NONE)
    run = way(best["pattern"], best["method"], result["settings"]["update"])
    beside = None if best["method"] == NONE else none[metric]
    sentence = outcome(metric, best[metric], result["dense"][metric], beside)
    least = f"the least loss of {count(len(rows), 'cell')}, at {percent(best['size'])} of the dense size"
    return f"{run}{sentence}, {least}."


def _front(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if row["front"]]


def _groups(result: Result) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Group the rows by pattern, as (heading, rows).

    The heading is the pattern's name and size, and for a mix the number of layers with each pattern.
    """
    groups = []
    for pattern, cells in groupby(result["rows"], itemgetter("pattern")):
        rows = list(cells)
        heading = f"{pattern}, {fine_percent(rows[0]['size'])} of the dense size"
        if len(layers := rows[0]["layers"]) > 1:
            heading += ": " + ", ".join(f"{count(held, 'layer')} {kind}" for kind, held in layers.items())
        groups.append((heading, rows))
    return groups


def comparison_table(result: Result) -> Table:
    """Return a table of the contents of a comparison's figures.json; rows on the Pareto front are bold."""
    metric = result["metric"]
    settings = result["settings"]
    title = f"{result['model']}, {settings['saliency']} masks, {settings['mode']} mode"
    title += "" if settings["update"] == NONE else f", {settings['update']} update"
    title += f"; dense {metric} {number(result['dense'][metric])}"
    note = overlap_note(result["measured"]["overlap"])
    numbers = columns("minutes", "size", metric, "gap closed", "time", "peak MiB")
    table = Table("pattern", "method", *numbers, title=title, caption=note, caption_justify="left")
    for pattern, rows in groupby(result["rows"], itemgetter("pattern")):
        table.add_section()
        for row in rows:
            minutes = "" if row["minutes"] is None else f"{row['minutes']:g}"
            cells = (minutes, fine_percent(row["size"]), number(row[metric]), percent(row["gap_closed"]))
            cost = (duration(row["seconds"]), whole(row["peak_memory_mb"]))
            table.add_row(pattern, row["method"], *cells, *cost, style="bold" if row["front"] else "")
    return table


@styled
def pareto(result: Result) -> Figure:
    """Draw the metric of every cell against its size; a line joins the cells on the Pareto front."""
    metric, (colors, markers) = result["metric"], _keys(result)
    picture = figure(WIDTH, 3.6)
    axes = picture.subplots()
    rows = [row for row in result["rows"] if math.isfinite(row[metric])]
    front = sorted((row["size"], row[metric]) for row in rows if row["front"])
    axes.plot(*zip(*front, strict=True), color=GRAY, linewidth=1.0, zorder=1) if front else None
    for row in rows:
        style: Any = {"markersize": 7, "alpha": 1.0} if row["front"] else {"markersize": 5.5, "alpha": 0.75}
        color, marker = colors[row["method"]], markers[row["pattern"]]
        axes.plot(row["size"], row[metric], color=color, marker=marker, linestyle="", **style)
    _metric_axis(axes, metric, [row[metric] for row in rows], result["dense"][metric])
    axes.set_xlabel("size, share of the dense model (smaller is better)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid()
    _legend(picture, colors, markers)
    return picture


def _keys(result: Result) -> tuple[dict[str, str], dict[str, str]]:
    """Return a colour for each method and a marker for each pattern, in the order of the rows."""
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    shapes = dict.fromkeys(row["pattern"] for row in result["rows"])
    colors = {method: PALETTE[place % len(PALETTE)] for place, method in enumerate(methods)}
    return colors, {pattern: MARKERS[place % len(MARKERS)] for place, pattern in enumerate(shapes)}


def _metric_axis(axes: Axes, metric: str, values: Sequence[float], dense: float) -> None:
    """Label the vertical axis, of a metric's values, and draw a line at the dense model's; log for perplexities."""
    label = metric
    axes.axhline(dense, color=GRAY, linewidth=1.0, linestyle=(0, (4, 2)), zorder=0)
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate("dense", (1.0, dense), (3, 0), **place, va="center", fontsize=8)
    if metric == "perplexity":
        finite = [value for value in (*values, dense) if math.isfinite(value)] or [1.0]
        axes.set(yscale="log", ylim=(min(finite) / 1.12, max(finite) * 1.12))
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        label = f"{metric}, log scale"
    axes.set_ylabel(f"{label}\n({better(metric)})")


def _legend(picture: Figure, colors: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """Draw a legend of methods by colour, and then of patterns by marker."""
    lines = [Line2D([], [], color=color, linewidth=4, label=name) for name, color in colors.items()]
    shapes = [Line2D([], [], color=GRAY, marker=shape, linestyle="", label=name) for name, shape in markers.items()]
    legend(picture, [*lines, *shapes], COLUMNS, handlelength=1.2, columnspacing=1.2)
