"""`permprune probe`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli
from permprune.cli.settings import parts
from permprune.errors import PermpruneError
from permprune.options import Count


@cli.command
def probe(
    model: cli.Model,
    out: Annotated[Path, typer.Option(help="folder for the classifier; must not exist yet")],
    data: Annotated[
        str | None,
        typer.Option(
            help="data to fit the classifier to: labelled images or sentences in a file or folder, or a data set id"
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="names of the classes in the order of their numbers, separated by commas"),
    ] = None,
    windows: Annotated[Count, typer.Option(help="windows of data to use, of 32 examples each")] = 128,
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """Fit a linear classifier on what MODEL computes of images or sentences; its other weights do not change."""

    names = [] if classes is None else parts(classes)
    if classes is not None and len({name.casefold() for name in names}) < max(2, len(names)):
        raise PermpruneError(f'--classes is "{classes}": give two or more names, all different, separated by commas')
    yield

    from permprune.jobs.probe import probe as run
    from permprune.report.words import number

    if not names:
        raise PermpruneError("--classes names no classes: give them in the order of their numbers")
    result = run(model, out, names, source=data, windows=windows, trust_remote_code=trust_remote_code)
    print(f"{result.metric} {number(result.value)} on {result.count} examples held out; written to {out}")
