"""`permprune plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from permprune.cli import common as cli
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation


@cli.command
def plan(
    model: cli.Model,
    config: PruneConfig,
    windows: cli.Windows = Evaluation.windows,
    gpu: Annotated[
        str | None,
        typer.Option(help="a GPU to forecast for: h100, h200, a100 or rtx4090", show_default="this machine"),
    ] = None,
    processes: Annotated[int, typer.Option(help="processes that torchrun starts; memory is that of each")] = 1,
    json: cli.Json = None,
) -> Iterator[None]:
    """Forecast the memory by part, the disk space and the time of pruning MODEL, from its config alone.

    The options are those of prune. With --memory, settings are chosen that fit in the limit.
    """

    from permprune.forecasts.machine import GPUS
    from permprune.options import Count, require, require_choice

    require("windows", windows, Count)
    require("processes", processes, Count)
    if gpu is not None:
        require_choice("gpu", gpu, GPUS)
    yield

    from permprune.forecasts.fitting import forecast

    found = forecast(model, config, windows=windows, gpu=gpu, processes=processes)
    cli.write_figures(json, found.to_json())
    show_forecast(model, found.to_json())


def show_forecast(model: str, figures: dict[str, Any]) -> None:
    """Print a forecast, `Forecast.to_json`."""
    from permprune.forecasts.tables import forecast_notes, peak_table, stages_table

    cli.show(stages_table(model, figures))
    cli.show(peak_table(figures))
    for note in forecast_notes(figures):
        print(note)
