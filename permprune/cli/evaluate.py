"""`permprune evaluate`."""

from __future__ import annotations

from permprune.cli import common as cli
from permprune.commands import Evaluation
from permprune.commands import evaluate as run


@cli.command
def evaluate(
    model: cli.Model,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    length: cli.Length = 512,
    json: cli.Json = None,
) -> None:
    """Perplexity of MODEL, which may be a folder that permprune wrote."""
    result = run(model, Evaluation(data, windows, length))
    cli.write_figures(json, result.to_json())
    error = "" if result.stderr is None else f" ± {result.stderr:.2f}"
    print(f"{result.metric} {result.value:.2f}{error} on {result.count} tokens")
