"""`permprune fetch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def fetch(name: Annotated[str, typer.Argument(help="a zoo name such as smollm2-135m")]) -> Iterator[None]:
    """Download a model of the zoo, unless it is in the cache, and print the folder of its Transformers checkpoint."""

    from permprune.errors import PermpruneError
    from permprune.options import nearest
    from permprune.zoo.models import MODELS, resolve_model

    if name not in MODELS:
        raise PermpruneError(f'the zoo has no model "{name}": {nearest(name, [*MODELS])}')
    yield
    print(resolve_model(name))
