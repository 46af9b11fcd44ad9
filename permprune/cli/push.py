"""`permprune push`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def push(
    folder: cli.Folder,
    repo: Annotated[str, typer.Argument(help="repository on the hub, as NAMESPACE/NAME")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private if it is new")] = False,
) -> Iterator[None]:
    """Upload all files of a pruned FOLDER to the Hugging Face hub (log in with `hf auth login` first)."""

    yield

    from permprune.pruning.folder import push_to_hub

    print(f"uploaded to {push_to_hub(folder, repo, private=private or None)}")
