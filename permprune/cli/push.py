"""`permprune push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def push(
    folder: Annotated[Path, typer.Argument(help="a folder that permprune wrote")],
    repo: Annotated[str, typer.Argument(help="the repository on the hub: NAMESPACE/NAME")],
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    revision: Annotated[str | None, typer.Option(help="a branch that exists; main if absent")] = None,
) -> None:
    """Upload a pruned FOLDER, the whole of it, to the Hugging Face hub (log in with `hf auth login`)."""

    from permprune.checkpoints.hub import push_to_hub

    print(f"uploaded to {push_to_hub(folder, repo, private=private or None, revision=revision)}")
