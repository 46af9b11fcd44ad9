"""`permprune unpack`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def unpack(
    folder: Annotated[Path, typer.Argument(help="a folder with packed weights")],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint with zeros; must not exist yet")],
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """Write a packed FOLDER as an ordinary checkpoint, with zeros for the pruned weights."""

    yield

    from permprune.jobs.packing import unpack_folder

    unpack_folder(folder, out, trust_remote_code=trust_remote_code)
    print(f"written to {out}")
