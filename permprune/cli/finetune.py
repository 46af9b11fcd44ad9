"""`permprune finetune`."""

from __future__ import annotations

from collections.abc import Iterator
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
        str | None,
        typer.Option(
            help="data to train on: labelled sentences or images, or text, in a file or folder, or a data set id",
            show_default="the default data",
        ),
    ] = None,
    dev: Annotated[
        str | None, typer.Option(help="data to measure each epoch on", show_default="a tenth of --data")
    ] = None,
    train: Annotated[
        str, typer.Option(help="weights to train: all, norms (with biases and the head), or head")
    ] = "all",
    adapters: Annotated[
        int | None,
        typer.Option(
            help="train linear layers through adapters (LoRA) of this rank, merged at the end: needs less memory",
            show_default="every weight",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="dense model whose outputs replace the labels; a language model learns from its text as well",
            show_default="none",
        ),
    ] = None,
    hidden: Annotated[
        float | None,
        typer.Option(
            help="weight of the distance between the blocks' outputs and the teacher's, relative to their length",
            show_default="0 for text that is predicted token by token, else 20",
        ),
    ] = None,
    metric: cli.Metric = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="passes over the data; the best epoch is kept", show_default="3, up to 20 for small data"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="peak learning rate",
            show_default="5e-5, 1e-4 below 50 million parameters, 0.002 times the size of the weights for a language "
            "model with a teacher, 1e-3 for norms, head and adapters",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="examples per step", show_default="32, or 4 windows of text")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens per example", show_default="128, or 512 for windows of text")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="examples to draw from --data", show_default="all, or 256 windows of text")
    ] = None,
    seed: Annotated[int, typer.Option(help="random seed: the same one gives the same weights")] = 0,
    trust_remote_code: cli.TrustRemoteCode = False,
    json: cli.Json = None,
    resume: cli.Resume = False,
) -> Iterator[None]:
    """Train MODEL on labelled data or text. In a pruned MODEL, pruned weights stay zero."""

    from permprune.jobs.finetune import FineTuning
    from permprune.jobs.finetune import finetune as run

    options = FineTuning(
        data,
        dev=dev,
        train=train,
        adapters=adapters,
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
    yield
    found = run(model, out, options, resume=resume, announce=announce)
    print(f"written to {out}")
    cli.write_figures(json, found.to_json())


def announce(found: FineTuned) -> None:
    """Print the result of training."""
    from permprune.report.words import number, with_error

    result = found.result
    beside = "" if found.dense is None else f", {number(found.dense)} of the teacher"
    value = f"{result.metric} {with_error(result.value, result.stderr)} on {result.count} {result.unit}"
    print(f"{value}, {number(found.before)} before training{beside}")
