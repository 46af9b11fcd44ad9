"""A comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from permprune.report.words import NONE, number, overlap_note, whole, with_error


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
