"""`permprune probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.errors import PermpruneError


@cli.command
def probe(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the classifier; must not exist yet")],
    data: Annotated[
        str | None, typer.Option(help="images, or a table of sentences, with labels; CIFAR-10 if absent")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="the classes by number, separated by commas; those of CIFAR-10 if absent"),
    ] = None,
    windows: Annotated[int, typer.Option(help="how much of it, 32 examples each")] = 128,
    trust_remote_code: cli.TrustRemoteCode = False,
) -> None:
    """Make a classifier of MODEL: a linear layer on what it makes of images or sentences, all else as it is."""

    from permprune.jobs.probe import probe as run
    from permprune.report.words import number
    from permprune.zoo.images import CLASSES

    names = list(CLASSES) if classes is None else cli.parts(classes)
    if len(names) < 2:
        raise PermpruneError(f"{len(names)} classes: name two or more, separated by commas")
    result = run(model, out, names, source=data, windows=windows, trust_remote_code=trust_remote_code)
    print(f"{result.metric} {number(result.value)} on {result.count} examples held out; written to {out}")
