"""`permprune ablate`."""

from __future__ import annotations

from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig


@cli.command
def ablate(
    model: cli.Model,
    config: PruneConfig,
    study: Annotated[str, typer.Option(help="what to vary: loss, groups or epochs")] = "loss",
    preset: Annotated[str, typer.Option(help="the learner: ours, or paper")] = "ours",
    epochs: Annotated[
        float | None, typer.Option(help="passes over the calibration text of each variant; the learner's own if absent")
    ] = None,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    metric: cli.Metric = None,
    json: cli.Json = None,
) -> None:
    """Vary one thing about the learned permutation of MODEL: its loss, its groups, or how long it learns."""

    from permprune.jobs.ablate import variants
    from permprune.jobs.compare import compare
    from permprune.jobs.trials import Evaluation
    from permprune.report.tables import comparison_table

    methods = variants(study, preset, max(0, config.shares(config.samples)[-1]), epochs=epochs)
    config, evaluation = Evaluation.beside(config, data, windows, metric=metric)
    result = compare(model, methods, config, evaluation=evaluation).to_json()
    cli.show(comparison_table(result))
    cli.write_figures(json, {"study": study, "preset": preset, **result})
