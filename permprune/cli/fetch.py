"""`permprune fetch`."""

from __future__ import annotations

from permprune.cli import common as cli


@cli.command
def fetch(model: cli.Model) -> None:
    """Download a MODEL of the zoo where the cache lacks it, and print the folder of its ordinary checkpoint."""

    from permprune.zoo.models import resolve_model

    print(resolve_model(model))
