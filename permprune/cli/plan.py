"""`permprune plan`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Table

from permprune.cli import common as cli
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation
from permprune.options import Count, require_choice
from permprune.system.files import gib
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.report.words import columns, duration


@partial(cli.command, without=("data", "metric", "examples"))
def plan(
    model: cli.Model,
    config: PruneConfig,
    evaluation: Evaluation,
    gpu: Annotated[
        str | None,
        typer.Option(help="a GPU to forecast for: h100, h200, a100 or rtx4090", show_default="this machine"),
    ] = None,
    processes: Annotated[Count, typer.Option(help="processes that torchrun starts; memory is that of each")] = 1,
    pack: cli.Pack = None,
    head: cli.Head = None,
    json: cli.Json = None,
) -> Iterator[None]:
    """Forecast the memory by part, the disk space and the time of pruning MODEL, from its config alone.

    The options are those of prune. With --memory, settings are chosen that fit in the limit.
    """

    config.require_one_choice()
    config = config.packed_as(pack, head)
    from permprune.forecasts.machine import GPUS

    if gpu is not None:
        require_choice("gpu", gpu, GPUS)
    yield

    from permprune.forecasts.fitting import forecast

    figures = forecast(model, config, windows=evaluation.windows, gpu=gpu, processes=processes).to_json()
    cli.write_figures(json, figures)
    print("\n".join(figures["recipe"]))
    cli.show(_stages(model, figures))
    cli.show(_peak(figures))
    for note in forecast_notes(figures):
        print(note)


def _stages(model: str, figures: dict[str, Any]) -> Table:
    """Return a table of the stages of a forecast, `Forecast.to_json`."""
    settings = figures["settings"]
    how = f"{settings['mode']} mode"
    if (processes := figures["processes"]) > 1:
        how += f", one of {processes} processes" + (" that divide the weights" if figures["shards"] > 1 else "")
    title = f"{model}, {settings['pattern']}, {how}, on {figures['machine']}"
    table = Table("stage", *columns("tensors", "time"), title=title)
    for stage in figures["stages"]:
        table.add_row(stage["name"], gib(stage["bytes"]), duration(stage["seconds"]))
    return table


def _peak(figures: dict[str, Any]) -> Table:
    """Return a table of the parts of the stage that needs the most memory."""
    stage = max(figures["stages"], key=lambda stage: stage["bytes"])
    table = Table("part", *columns("memory"), title=f"memory at the peak, {stage['name']}")
    for part in stage["parts"]:
        if part["bytes"]:
            table.add_row(part["name"], gib(part["bytes"]))
    table.add_row("program", gib(figures["program"]))
    return table


def forecast_notes(figures: dict[str, Any]) -> list[str]:
    """Return what will run, the totals of a forecast, and what it assumes, one sentence each."""
    host, device = f"{gib(figures['host'])} of host memory", figures["device"]
    notes = [f"peak: {host}" if device is None else f"peak: {gib(device)} of device memory, {host}"]
    written = ", ".join(f"{name} {gib(size)}" for name, size in figures["disk"].items() if size)
    notes.append(f"disk: {gib(sum(figures['disk'].values()))} ({written})")
    notes.append(intention(figures))
    if figures["advice"]:
        notes.append(figures["advice"])
    return [*notes, *(f"assumed: {sentence}" for sentence in figures["assumed"])]


def intention(figures: dict[str, Any]) -> str:
    """Return whether weights change in a run, and how long it takes, from `Forecast.to_json`."""
    settings, changes = figures["settings"], figures["changes"]
    effort = f"effort {settings['effort']}, " if settings["effort"] else ""
    kept = "the weights that are kept stay as they are"
    if changes:
        kept = f"{changes} changes the weights that are kept (--effort order: none)"
    known = [stage["seconds"] for stage in figures["stages"]]
    more = ", and the stages whose time is not known" if None in known else ""
    time = f"about {duration(sum(filter(None, known)))} on {figures['machine']}{more}"
    return f"{effort}{settings['samples']} windows; {kept}; {time}"
