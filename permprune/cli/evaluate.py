"""`permprune evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.engine.measuring import Evaluation
from permprune.errors import PermpruneError
from permprune.evaluation.lm_tasks import TaskList, evaluate_tasks


@partial(cli.command, without=("task_data", "examples"))
def evaluate(
    model: cli.Model,
    evaluation: Evaluation,
    tasks: TaskList,
    kv: Annotated[
        Path | None, typer.Option(help="folder that permprune kv wrote: measures perplexity with that pruned cache")
    ] = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> Iterator[None]:
    """Measure perplexity, accuracy or word error rate of MODEL, dense or pruned, or with --tasks its scores on tasks.

    With --tasks, --data is a folder with local files of the tasks.
    """

    tasks = dataclasses.replace(tasks, data=evaluation.source)
    if kv is not None and (tasks.names or tasks.files or evaluation.metric):
        raise PermpruneError("--kv measures perplexity on text: leave out --tasks, --task-file and --metric")
    yield

    from permprune.jobs.evaluate import evaluate as run
    from permprune.jobs.kv import evaluate_kv
    from permprune.report.tables import tasks_table
    from permprune.report.words import result_text

    if tasks.names or tasks.files:
        results = evaluate_tasks(model, tasks, trust_remote_code=trust_remote_code)
        figures = {"model": model, **dataclasses.asdict(tasks), "results": [result.to_json() for result in results]}
        cli.show(tasks_table(model, results))
        cli.write_figures(json, figures)
        return
    if kv is not None:
        cached = evaluate_kv(model, kv, evaluation, trust_remote_code=trust_remote_code)
        sizes = {"cache_bytes": cached.nbytes, "dense_cache_bytes": cached.dense_nbytes}
        pruned, dense = (f"{size / 1e6:.1f} MB" for size in sizes.values())
        print(f"{result_text(cached.result)}; cache {pruned}, dense {dense}")
        cli.write_figures(json, {**cached.result.to_json(), **sizes})
        return
    result = run(model, evaluation, trust_remote_code=trust_remote_code)
    print(result_text(result))
    cli.write_figures(json, result.to_json())
