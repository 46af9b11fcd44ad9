"""`permprune finetune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.jobs.finetune import FineTuned, FineTuning
from permprune.jobs.finetune import finetune as run


@cli.command
def finetune(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the trained model; must not exist yet")],
    options: FineTuning,
    json: cli.Json = None,
    resume: cli.Resume = False,
) -> Iterator[None]:
    """Train MODEL on labelled data or text. In a pruned MODEL, pruned weights stay zero."""

    yield

    trained = run(model, out, options, resume=resume, announce=announce)
    print(f"written to {out}")
    cli.write_figures(json, trained.to_json())


def announce(trained: FineTuned) -> None:
    """Print the result of training."""
    from permprune.report.words import number, result_text

    beside = "" if trained.dense is None else f", {number(trained.dense)} of the teacher"
    print(f"{result_text(trained.result)}, {number(trained.before)} before training{beside}")
