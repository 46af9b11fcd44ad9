"""`permprune compare`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError


@partial(cli.command, without=("effort", "permute", "shard"))
def compare(
    model: cli.Model,
    config: PruneConfig,
    methods: cli.Methods = ("none,ria,reconstruction,newton,learned"),
    data: cli.Data = None,
    windows: cli.Windows = Evaluation.windows,
    metric: cli.Metric = None,
    tasks: cli.Tasks = "",
    task_file: cli.TaskFile = None,
    task_data: cli.TaskData = None,
    limit: cli.Limit = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the checkpoint of the best method; must not exist yet")
    ] = None,
    json: cli.Json = None,
    picture: cli.Picture = None,
) -> Iterator[None]:
    """Compare permuters on one MODEL: perplexity, share of the gap closed, task scores, seconds and peak memory."""

    from permprune.permuters.registry import permuters

    names = [name for name in cli.parts(methods) if name != "dense"]
    chosen = cli.task_list(tasks, task_file, task_data, limit)
    config, evaluation = Evaluation.beside(config, data, windows, metric=metric, tasks=chosen)
    if not cli.parts(methods):
        raise PermpruneError("--methods names no search: give at least one")
    permuters(names)
    yield

    from permprune.jobs.compare import Comparison
    from permprune.jobs.compare import compare as run
    from permprune.report.comparison import comparison_table, write_comparison

    def announce(result: Comparison) -> None:
        figures = result.to_json()
        cli.show(comparison_table(figures))
        cli.write_figures(json, figures)
        if picture is not None:
            write_comparison(figures, picture)

    best = run(model, names, config, evaluation=evaluation, out=out, announce=announce).best
    if out is not None:
        print(f"{best.method} written to {out} (report.html, permprune.json)")
