"""`permprune fetch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from permprune.cli import common as cli


@cli.command
def fetch(model: Annotated[str, typer.Argument(help="a zoo name such as smollm2-135m")]) -> Iterator[None]:
    """Download a model of the zoo, unless it is in the cache, and print the folder of its Transformers checkpoint."""

    from permprune.errors import PermpruneError
    from permprune.options import nearest
    from permprune.zoo.models import MODELS, resolve_model

    if model not in MODELS:
        raise PermpruneError(f'the zoo has no model "{model}": {nearest(model, [*MODELS])}')
    yield
    print(resolve_model(model))
