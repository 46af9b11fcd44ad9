"""`permprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from permprune.cli import common as cli
from permprune.jobs.compare import compare as run
from permprune.jobs.trials import Evaluation
from permprune.report.comparison import comparison_title, write_comparison
from permprune.report.words import number, overlap_note, whole, with_error
from permprune.settings import Settings


@cli.command
def compare(
    model: cli.Model,
    settings: Settings,
    methods: Annotated[str, typer.Option(help=f"permuters, separated by commas: {cli.METHODS}")] = (
        "none,ria,reconstruction,newton,learned"
    ),
    data: cli.Data = None,
    windows: cli.Windows = 24,
    metric: cli.Metric = None,
    tasks: cli.Tasks = "",
    task_file: cli.TaskFile = None,
    task_data: cli.TaskData = None,
    limit: cli.Limit = None,
    json: cli.Json = None,
    picture: Annotated[Path | None, typer.Option(help="write a picture (.png) of the table")] = None,
) -> None:
    """Compare permuters on one MODEL: perplexity, share of the gap closed, task scores, seconds, memory."""
    names = [name for name in cli.parts(methods) if name != "dense"]
    chosen = cli.task_list(tasks, task_file, task_data, limit)
    result = run(model, names, *Evaluation.beside(settings, data, windows, metric, chosen))
    cli.show(comparison_table(result))
    cli.write_figures(json, result)
    if picture is not None:
        write_comparison(result, picture)


def comparison_table(result: dict[str, Any]) -> Table:
    """What `permprune.compare` returns, for the terminal."""
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
