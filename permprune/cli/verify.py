"""`permprune verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def verify(
    folder: Annotated[Path, typer.Argument(help="a folder that permprune wrote")],
    trust_remote_code: cli.TrustRemoteCode = False,
) -> None:
    """Prove a pruned FOLDER: N:M in stored order, it reloads, and its outputs are the masked model's."""

    from permprune.jobs.verify import verify as run

    found = run(folder, trust_remote_code=trust_remote_code)
    print(f"{found.layers} layers hold the pattern in stored order")
    if dense := str(found.dense):
        print(dense)
    print(f"reloaded; logits differ by at most {found.difference:.1e} from the masked model in its own order")
