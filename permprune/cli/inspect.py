"""`permprune inspect`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from permprune.cli import common as cli

if TYPE_CHECKING:
    from permprune.jobs.inspect import InspectedSpace


@cli.command
def inspect(
    model: cli.Model,
    verify: Annotated[
        bool, typer.Option("--verify", help="test each space with a random permutation, in float64")
    ] = False,
    trust_remote_code: cli.TrustRemoteCode = False,
) -> Iterator[None]:
    """List the channel spaces of MODEL: which channels can be reordered, and how many parameters move with them."""

    yield

    from permprune.jobs.inspect import inspect as run

    kinds: dict[tuple[str, ...], list[float]] = {}
    for space in run(model, verify=verify, trust_remote_code=trust_remote_code):
        name = re.sub(r"\d+", "*", space.name)
        kind = (name, str(space.size), _freedom(space), str(space.members), str(space.readers))
        kinds.setdefault(kind, []).append(space.difference or 0.0)
    table = Table(title=f"channel spaces of {model}")
    for title in ("space", "size", "freedom", "members", "readers", "count"):
        table.add_column(title, justify="left" if title in ("space", "freedom") else "right", overflow="fold")
    if verify:
        table.add_column("max difference", justify="right")
    for cells, differences in kinds.items():
        table.add_row(*cells, str(len(differences)), *([f"{max(differences):.1e}"] if verify else []))
    cli.show(table)


def _freedom(space: InspectedSpace) -> str:
    if space.freedom == "frozen":
        return f"frozen: {space.reason}"
    return space.freedom if space.blocks == 1 else f"in each of {space.blocks} blocks"
