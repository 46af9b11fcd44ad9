"""Benchmarks as a table and as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from permprune.report.words import columns, count, number

Figures = Mapping[str, Any]
"""A benchmark as JSON values (`Benchmark.to_json`)."""

GENERATION = ("batch", "context", "prefill tokens/s", "first token", "decode tokens/s", "cache MB")
READING = ("batch", "context", "items/s", "a batch")


def bench_table(figures: Figures) -> Table:
    """Return a table for the terminal: speeds in tokens or inputs per second, times in milliseconds."""
    numbers = columns("MB", "resident MB", *(GENERATION if generates(figures["rows"][0]["speeds"]) else READING))
    title = f"{count(figures['threads'], 'thread')} of the {figures['device']}"
    table = Table(Column("model", overflow="fold"), *numbers, title=title)
    for row in figures["rows"]:
        table.add_section()
        model = [row["name"], f"{row['bytes'] / 1e6:,.0f}", f"{row['resident'] / 1e6:,.0f}"]
        for speed in row["speeds"]:
            table.add_row(*model, *_cells(speed))
            model = [""] * len(model)
    return table


def _cells(speed: Mapping[str, Any]) -> list[str]:
    """Return the cells of the columns `GENERATION` or `READING`."""
    cells = [str(speed["batch"]), str(speed["context"] or ""), number(rate(speed))]
    if "next_token" not in speed:
        return [*cells, f"{1000 * speed['seconds']:,.1f} ms"]
    prompts = number(speed["batch"] * speed["context"] / speed["first_token"])
    cache = f"{speed['cache'] / 1e6:,.1f}" if speed.get("cache") else ""
    return [*cells[:2], prompts, f"{1000 * speed['first_token']:,.0f} ms", cells[2], cache]


def generates(speeds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the speeds are those of models that generate text (`Speed`), not `Throughput`."""
    return "next_token" in speeds[0]


def rate(speed: Mapping[str, Any]) -> float:
    """Return the generated tokens per second, over all sequences, or the inputs per second."""
    return float(speed["batch"] / speed["next_token" if "next_token" in speed else "seconds"])


def cell_name(speed: Mapping[str, Any]) -> str:
    """Return the batch size and context length of a speed, as text."""
    return f"batch {speed['batch']}" + (f", context {speed['context']}" if speed["context"] else "")


def summary(figures: Figures, row: Mapping[str, Any]) -> str:
    """Compare a checkpoint to the smallest and the fastest dense model, as text: size, cache, and speed.

    `row` is the checkpoint's row of `figures`. The cache is that of the last measurement, and left out if it takes as
    many bytes as the smallest of a dense model.
    """
    dense = [other for other in figures["rows"] if other["dense"]]
    smallest = min(other["bytes"] for other in dense)
    cache, least = row["speeds"][-1].get("cache"), min(other["speeds"][-1].get("cache", 0) for other in dense)
    cached = f", with {cache / least:.2f} of its cache" if cache and least and cache != least else ""
    speeds = []
    for place, speed in enumerate(row["speeds"]):
        fastest = max(rate(other["speeds"][place]) for other in dense)
        speeds.append(f"{rate(speed) / fastest:.2f} at {cell_name(speed)}")
    what = "decoding speed" if generates(row["speeds"]) else "speed"
    return (
        f"{row['bytes'] / smallest:.2f} of the size of the smallest dense model{cached}; times the {what} of "
        f"the fastest: {'; '.join(speeds)}"
    )
