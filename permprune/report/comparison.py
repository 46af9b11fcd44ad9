"""A comparison as a picture and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from permprune.evaluation.result import metric_named
from permprune.report.pictures import metric_axis
from permprune.report.style import BLUE, GRAY, ORANGE, figure, styled, write_png
from permprune.report.words import NONE, duration, number, overlap_note, percent, whole, with_error


@styled
def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a comparison as PNG; `result` is what `Comparison.to_json` returns.

    It shows the metric by method, the best first, with columns for the share of the gap closed and the time. Raises
    `PermpruneError` if it cannot be written.
    """
    metric = result["metric"]
    sign = -1 if metric_named(metric).higher_is_better else 1
    rows = sorted(result["rows"], key=lambda row: sign * row[metric] if math.isfinite(row[metric]) else math.inf)
    picture = figure(7.4, 1.3 + 0.34 * len(rows))
    axes, margin = picture.subplots(1, 2, sharey=True, width_ratios=(3, 1.35))
    margin.axis("off")
    metric_axis(axes, "x", metric, [row[metric] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    cells = [(-0.8, metric, "gap closed", "time")]
    for place, row in enumerate(rows):
        color = {"dense": GRAY, "none": ORANGE}.get(row["method"], BLUE)
        axes.plot(row[metric], place, color=color, marker="o", markersize=8)
        cells.append((place, number(row[metric]), percent(row["gap_closed"]), duration(row["seconds"])))
    for height, *texts in cells:
        for edge, text in zip((0.3, 0.7, 1.0), texts, strict=True):
            margin.text(edge, height, text, transform=margin.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.grid()
    axes.tick_params(axis="y", length=0, labelsize=9)
    picture.suptitle(comparison_title(result), x=0.01, ha="left", fontsize=10)
    write_png(picture, path)


def comparison_title(result: Mapping[str, Any]) -> str:
    """Return a title that lists what the rows of a comparison have in common."""
    title = f"{result['model']}, {result['pattern']}, {result['saliency']} masks, {result['mode']} mode"
    return title if result["update"] == NONE else f"{title}, {result['update']} update"


def comparison_table(result: dict[str, Any]) -> Table:
    """Return a table of a comparison's contents, as of `Comparison.to_json`."""
    table = Table(title=comparison_title(result), caption=overlap_note(result["overlap"]), caption_justify="left")
    table.add_column("method")
    scored = "score" in result["rows"][0]
    for title in (result["metric"], "gap closed", *(["task score"] if scored else []), "seconds", "peak MiB"):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        closed = "" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
        score = [with_error(row["score"], row["score_stderr"])] if scored else []
        figures = (number(row[result["metric"]]), closed, *score)
        table.add_row(row["method"], *figures, f"{row['seconds']:.0f}", whole(row["peak_memory_mb"]))
    return table
