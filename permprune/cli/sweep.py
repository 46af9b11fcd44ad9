"""`permprune sweep`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from permprune.cli import common as cli
from permprune.errors import PermpruneError
from permprune.jobs.sweep import sweep as run
from permprune.jobs.trials import Evaluation
from permprune.report.sweep import sweep_decision
from permprune.report.words import duration, fine_percent, number, overlap_note, percent, whole, with_error
from permprune.settings import Settings


@partial(cli.command, without=("pattern", "minutes"))
def sweep(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for figures, report and picture; must not exist yet")],
    settings: Settings,
    patterns: Annotated[
        str, typer.Option(help="N:M patterns, separated by commas; mixed: a pattern for each layer")
    ] = "1:4,2:4,4:8,2:8,8:16,mixed",
    methods: Annotated[str, typer.Option(help=f"permuters, separated by commas: {cli.METHODS}")] = "none,ria,newton",
    budgets: Annotated[
        str, typer.Option(help="minutes that a search may take, separated by commas; as long as it likes if absent")
    ] = "",
    data: cli.Data = None,
    windows: cli.Windows = 24,
    metric: cli.Metric = None,
    tasks: cli.Tasks = "",
    task_file: cli.TaskFile = None,
    task_data: cli.TaskData = None,
    limit: cli.Limit = None,
    jobs: Annotated[int, typer.Option(help="processes that take a pattern each at a time")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted sweep")] = False,
) -> None:
    """Patterns x methods x budgets on MODEL: what each size costs, as a table, a page and a picture."""
    chosen = cli.task_list(tasks, task_file, task_data, limit)
    settings, evaluation = Evaluation.beside(settings, data, windows, metric, chosen)
    names = cli.parts(methods)
    run(model, out, cli.parts(patterns), names, _minutes(budgets), settings, evaluation, jobs, resume, announce)
    print(f"written to {out} (report.html, figures.json, pareto.png)")


def announce(result: dict[str, Any]) -> None:
    """Print what a sweep came to."""
    cli.show(sweep_table(result))
    print(sweep_decision(result))


def _minutes(budgets: str) -> list[float]:
    try:
        return [float(budget) for budget in cli.parts(budgets)]
    except ValueError:
        raise PermpruneError(f'"{budgets}" is no list of minutes: give it as 5,20') from None


def sweep_table(result: dict[str, Any]) -> Table:
    """What `permprune.sweep` returns, for the terminal; cells that no other beats are bold."""
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
