"""`permprune evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from permprune.cli import common as cli
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.evaluation.lm_tasks import TaskList, evaluate_tasks
from permprune.models.modality import pooling_asked
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.evaluation.result import Result
    from permprune.report.words import columns, result_text, with_error


@partial(cli.command, without=("examples",))
def evaluate(
    model: cli.Model,
    evaluation: Evaluation,
    tasks: TaskList,
    kv: Annotated[
        Path | None, typer.Option(help="folder that permprune kv wrote: measures perplexity with that pruned cache")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="zoo name, folder or hub id of the dense model: measures the agreement with it")
    ] = None,
    task: cli.Task = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Measure perplexity, accuracy or word error rate of MODEL, dense or pruned, or with --tasks its scores on tasks.

    With --dense a model is compared with another: a sentence encoder by embeddings, neighbours and similarities.
    """

    scored = bool(tasks.names or tasks.files)
    if not scored and tasks != TaskList():
        raise PermpruneError("--limit is a setting of tasks: name some with --tasks, or leave it out")
    pooling_asked(task)
    if kv is not None and (scored or evaluation.metric or dense or task):
        raise PermpruneError("--kv measures perplexity on text: leave out --tasks, --metric, --dense and the like")
    if scored and (dense or task or evaluation != Evaluation()):
        raise PermpruneError(
            "--tasks scores language models: leave out --data, --metric, --windows, --length, --dense and --task"
        )
    yield

    from permprune.jobs.evaluate import evaluate_all
    from permprune.jobs.kv import evaluate_kv

    if scored:
        results = evaluate_tasks(model, tasks, trust_remote_code=trust_remote_code)
        figures = {"model": model, **dataclasses.asdict(tasks), "results": [result.to_json() for result in results]}
        cli.show(_table(model, results))
        cli.write_figures(json, figures)
        return
    if kv is not None:
        cached = evaluate_kv(model, kv, evaluation, trust_remote_code=trust_remote_code)
        sizes = {"cache_bytes": cached.nbytes, "dense_cache_bytes": cached.dense_nbytes}
        pruned, dense = (f"{size / 1e6:.1f} MB" for size in sizes.values())
        print(f"{result_text(cached.result)}; cache {pruned}, dense {dense}")
        cli.write_figures(json, {**cached.result.to_json(), **sizes})
        return
    first, *others = evaluate_all(model, evaluation, dense=dense, task=task, trust_remote_code=trust_remote_code)
    for result in (first, *others):
        print(result_text(result))
    more = {"others": [result.to_json() for result in others]} if others else {}
    cli.write_figures(json, {**first.to_json(), **more})


def _table(model: str, results: Sequence[Result]) -> Table:
    """Return a table of the results of tasks."""
    table = Table("task", "metric", *columns("value", "measured on"), title=model)
    for result in results:
        if result.task == "average":
            table.add_section()
        figure = with_error(result.value, result.stderr)
        table.add_row(result.task, result.metric.name, figure, f"{result.count:,} {result.unit}")
    return table
