"""`permprune finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from permprune.cli import common as cli

if TYPE_CHECKING:
    from permprune.jobs.finetune import FineTuned


@cli.command
def finetune(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the trained model; must not exist yet")],
    data: Annotated[
        str | None, typer.Option(help="labelled sentences, text or images to train on, or a data set id")
    ] = None,
    dev: Annotated[str | None, typer.Option(help="data to measure epochs on; a tenth of --data if absent")] = None,
    train: Annotated[str, typer.Option(help="all, norms or head; norms: also biases and the head")] = "all",
    teacher: Annotated[
        str | None, typer.Option(help="the dense model: what it says counts in place of labels, and beside a text")
    ] = None,
    hidden: Annotated[
        float,
        typer.Option(help="weight of the distance of the blocks' outputs to the teacher's: of text 1e-5, else 1e-3"),
    ] = 0.0,
    metric: cli.Metric = None,
    epochs: Annotated[
        int | None, typer.Option(help="passes over the data, of which the best counts; 3, of small data up to 20")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="largest learning rate; 5e-5, of small models 1e-4, and 1e-3 for norms or head")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="examples in a step; 32, of windows of text 4")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in an example; 128, of windows of text 512")] = None,
    rows: Annotated[int | None, typer.Option(help="examples to draw; all, of windows of text 256")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from an interrupted run's last epoch")] = False,
) -> None:
    """Train MODEL on labelled data or text; of a pruned folder only what is left, its zeros stay."""

    from permprune.jobs.finetune import FineTuning
    from permprune.jobs.finetune import finetune as run

    options = FineTuning(
        data,
        dev=dev,
        train=train,
        teacher=teacher,
        hidden=hidden,
        metric=metric,
        epochs=epochs,
        lr=lr,
        batch=batch,
        length=length,
        rows=rows,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    found = run(model, out, options, resume=resume, announce=announce)
    print(f"written to {out}")
    cli.write_figures(json, found.to_json())


def announce(found: FineTuned) -> None:
    """Print what training came to."""
    from permprune.report.words import number, with_error

    result = found.result
    beside = "" if found.dense is None else f", {number(found.dense)} of the teacher"
    value = f"{result.metric} {with_error(result.value, result.stderr)} on {result.count} {result.unit}"
    print(f"{value}, {number(found.before)} before training{beside}")
