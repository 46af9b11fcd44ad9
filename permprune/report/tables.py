"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from permprune.evaluation.result import Result
from permprune.report.words import duration, fine_percent, number, overlap_note, percent, whole, with_error


def tasks_table(model: str, results: Sequence[Result]) -> Table:
    """Return a table of the results of `permprune.evaluate_tasks`."""
    table = Table(title=model)
    for title in ("task", "metric"):
        table.add_column(title)
    for title in ("value", "measured on"):
        table.add_column(title, justify="right")
    for result in results:
        if result.task == "average":
            table.add_section()
        figure = with_error(result.value, result.stderr)
        table.add_row(result.task, result.metric.name, figure, f"{result.count:,} {result.unit}")
    return table


def sweep_table(result: dict[str, Any]) -> Table:
    """Return a table of the contents of a sweep's figures.json; rows on the Pareto front are bold."""
    metric = result["metric"]
    title = f"{result['model']}, dense {metric} {number(result['dense'][metric])}"
    table = Table(title=title, caption=overlap_note(result["measured"]["overlap"]), caption_justify="left")
    for title in ("pattern", "method"):
        table.add_column(title)
    scored = "score" in result["dense"]
    for title in ("minutes", "size", metric, "gap closed", *(["task score"] if scored else []), "time", "peak MiB"):
        table.add_column(title, justify="right")
    last = ""
    for row in result["rows"]:
        if last and row["pattern"] != last:
            table.add_section()
        last = row["pattern"]
        minutes = "" if row["minutes"] is None else f"{row['minutes']:g}"
        cells = (minutes, fine_percent(row["size"]), number(row[metric]), percent(row["gap_closed"]))
        score = [with_error(row["score"], row["score_stderr"])] if scored else []
        cost = (duration(row["seconds"]), whole(row["peak_memory_mb"]))
        table.add_row(last, row["method"], *cells, *score, *cost, style="bold" if row["front"] else "")
    return table
