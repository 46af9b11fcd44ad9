"""`permprune evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def evaluate(
    model: cli.Model,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    length: cli.Length = 512,
    metric: cli.Metric = None,
    tasks: cli.Tasks = "",
    task_file: cli.TaskFile = None,
    limit: cli.Limit = None,
    few_shot: Annotated[
        int | None, typer.Option(help="solved examples in each prompt of the tasks", show_default="each task's own")
    ] = None,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
) -> None:
    """Measure perplexity, accuracy or word error rate of MODEL, dense or pruned, or with --tasks its scores on tasks.

    With --tasks, --data is a folder with local files of the tasks.
    """

    from permprune.evaluation.lm_tasks import evaluate_tasks
    from permprune.jobs.evaluate import evaluate as run
    from permprune.jobs.trials import Evaluation
    from permprune.report.tables import tasks_table
    from permprune.report.words import number

    if chosen := cli.task_list(tasks, task_file, data, limit, few_shot):
        results = evaluate_tasks(model, chosen, trust_remote_code=trust_remote_code)
        figures = {"model": model, **dataclasses.asdict(chosen), "results": [result.to_json() for result in results]}
        cli.show(tasks_table(model, results))
        cli.write_figures(json, figures)
        return
    result = run(model, Evaluation(data, windows, length, metric=metric), trust_remote_code=trust_remote_code)
    error = "" if result.stderr is None else f" ± {number(result.stderr)}"
    print(f"{result.metric} {number(result.value)}{error} on {result.count} {result.unit}")
    cli.write_figures(json, result.to_json())
