"""`permprune ablate`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig


@partial(cli.command, without=("effort", "permute", "preset", "shard"))
def ablate(
    model: cli.Model,
    config: PruneConfig,
    study: Annotated[str, typer.Option(help="what to vary: loss, groups or epochs")] = "loss",
    preset: Annotated[str, typer.Option(help="base parameters: ours, or paper for the published ones")] = "ours",
    epochs: Annotated[
        float | None,
        typer.Option(
            help="passes of each variant over the calibration data; the study epochs has its own",
            show_default="the length of the preset",
        ),
    ] = None,
    data: cli.Data = None,
    windows: cli.Windows = 24,
    metric: cli.Metric = None,
    json: cli.Json = None,
) -> Iterator[None]:
    """Repeat an ablation of the learned permuter on MODEL: vary its loss, its groups or its number of epochs."""

    from permprune.engine.measuring import Evaluation
    from permprune.jobs.ablate import variants

    methods = variants(study, preset, max(0, config.shares(config.samples)[-1]), epochs=epochs)
    config, evaluation = Evaluation.beside(config, data, windows, metric=metric)
    yield

    from permprune.jobs.compare import compare
    from permprune.report.tables import comparison_table

    result = compare(model, methods, config, evaluation=evaluation).to_json()
    cli.show(comparison_table(result))
    cli.write_figures(json, {"study": study, "preset": preset, **result})
