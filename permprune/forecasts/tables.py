"""Forecasts of runs as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from permprune.report.words import duration
from permprune.system.files import gib


def stages_table(model: str, figures: dict[str, Any]) -> Table:
    """Return a table of the stages of a forecast, `Forecast.to_json`."""
    settings = figures["settings"]
    how = "layer by layer" if figures["streamed"] else f"{settings['mode']} mode"
    if (processes := figures["processes"]) > 1:
        how += f", one of {processes} processes" + (" that divide the weights" if figures["shards"] > 1 else "")
    title = f"{model}, {settings['pattern']} with {settings['permute']}, {how}, on {figures['machine']}"
    table = Table(title=title)
    table.add_column("stage")
    for column in ("tensors", "time"):
        table.add_column(column, justify="right")
    for stage in figures["stages"]:
        table.add_row(stage["name"], gib(stage["bytes"]), duration(stage["seconds"]))
    return table


def peak_table(figures: dict[str, Any]) -> Table:
    """Return a table of the parts of the stage that needs the most memory."""
    stage = max(figures["stages"], key=lambda stage: stage["bytes"])
    table = Table(title=f"memory at the peak, {stage['name']}")
    table.add_column("part")
    table.add_column("memory", justify="right")
    for part in stage["parts"]:
        if part["bytes"]:
            table.add_row(part["name"], gib(part["bytes"]))
    table.add_row("program", gib(figures["program"]))
    return table


def forecast_notes(figures: dict[str, Any]) -> list[str]:
    """Return the totals of a forecast and what it assumes, one sentence each."""
    host, device = f"{gib(figures['host'])} of host memory", figures["device"]
    notes = [f"peak: {host}" if device is None else f"peak: {gib(device)} of device memory, {host}"]
    written = ", ".join(f"{name} {gib(size)}" for name, size in figures["disk"].items() if size)
    notes.append(f"disk: {gib(sum(figures['disk'].values()))} ({written})")
    known = [stage["seconds"] for stage in figures["stages"]]
    more = ", without the stages whose time is not known" if None in known else ""
    notes.append(
        f"time: about {duration(sum(filter(None, known)))}{more}; an estimate, from rates and operation counts"
    )
    if figures["advice"]:
        notes.append(figures["advice"])
    return [*notes, *(f"assumed: {sentence}" for sentence in figures["assumed"])]
