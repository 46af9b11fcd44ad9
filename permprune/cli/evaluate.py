"""`permprune evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permprune.cli import common as cli
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError

if TYPE_CHECKING:
    from permprune.evaluation.result import Result


@cli.command
def evaluate(
    model: cli.Model,
    data: cli.Data = None,
    windows: cli.Windows = Evaluation.windows,
    length: cli.Length = Evaluation.length,
    metric: cli.Metric = None,
    tasks: cli.Tasks = "",
    task_file: cli.TaskFile = None,
    limit: cli.Limit = None,
    kv: Annotated[
        Path | None, typer.Option(help="folder that permprune kv wrote: measures perplexity with that pruned cache")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="solved examples in each prompt of the tasks", show_default="each task's own")
    ] = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Measure perplexity, accuracy or word error rate of MODEL, dense or pruned, or with --tasks its scores on tasks.

    With --tasks, --data is a folder with local files of the tasks.
    """

    from permprune.evaluation.lm_tasks import evaluate_tasks

    if kv is not None and (tasks or task_file or metric):
        raise PermpruneError("--kv measures perplexity on text: leave out --tasks, --task-file and --metric")
    chosen = cli.task_list(tasks, task_file, data, limit, few_shot)
    evaluation = Evaluation(data, windows, length, metric=metric)
    yield

    from permprune.jobs.evaluate import evaluate as run
    from permprune.jobs.kv import evaluate_kv
    from permprune.report.tables import tasks_table

    if chosen:
        results = evaluate_tasks(model, chosen, trust_remote_code=trust_remote_code)
        figures = {"model": model, **dataclasses.asdict(chosen), "results": [result.to_json() for result in results]}
        cli.show(tasks_table(model, results))
        cli.write_figures(json, figures)
        return
    if kv is not None:
        found = evaluate_kv(model, kv, evaluation, trust_remote_code=trust_remote_code)
        print(f"{_said(found.result)}; cache {found.nbytes / 1e6:.1f} MB, dense {found.dense_nbytes / 1e6:.1f} MB")
        sizes = {"cache_bytes": found.nbytes, "dense_cache_bytes": found.dense_nbytes}
        cli.write_figures(json, {**found.result.to_json(), **sizes})
        return
    result = run(model, evaluation, trust_remote_code=trust_remote_code)
    print(_said(result))
    cli.write_figures(json, result.to_json())


def _said(result: Result) -> str:
    from permprune.report.words import number

    error = "" if result.stderr is None else f" ± {number(result.stderr)}"
    return f"{result.metric} {number(result.value)}{error} on {result.count} {result.unit}"
