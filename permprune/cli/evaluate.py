"""`permprune evaluate`."""

from __future__ import annotations

from permprune.cli import common as cli
from permprune.commands import Evaluation
from permprune.commands import evaluate as run
from permprune.report import number


@cli.command
def evaluate(
    model: cli.Model,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    length: cli.Length = 512,
    metric: cli.Metric = None,
    json: cli.Json = None,
) -> None:
    """Perplexity, accuracy or word error rate of MODEL, which may be a folder that permprune wrote."""
    result = run(model, Evaluation(data, windows, length, metric=metric))
    cli.write_figures(json, result.to_json())
    error = "" if result.stderr is None else f" ± {number(result.stderr)}"
    print(f"{result.metric} {number(result.value)}{error} on {result.count} {result.unit}")
