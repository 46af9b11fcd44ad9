"""`permprune methods`."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer
from rich.table import Table

from permprune.cli import common as cli
from permprune.errors import PermpruneError
from permprune.options import nearest, numbers_of


@cli.command
def methods(name: Annotated[str | None, typer.Argument(help="a method such as newton")] = None) -> None:
    """List permuters, saliencies, updates and losses, or show what one of them does and its options.

    Options follow the name of a method, as in newton:rounds=6:swaps=2; those of the loss follow a permuter's.
    """

    from permprune.losses.objective import Objective
    from permprune.permuters.registry import PERMUTERS
    from permprune.saliency.metrics import SALIENCIES
    from permprune.training.train import Training
    from permprune.updates.methods import UPDATES

    known: dict[str, dict[str, Any]] = {
        "permuter": PERMUTERS, "saliency": SALIENCIES, "update": UPDATES, "train": {"train": Training},
        "loss": {"objective": Objective},
    }  # fmt: skip
    if name is None:
        table = Table("method", "kind", "what it does", "options")
        for kind, registry in known.items():
            for one, method in registry.items():
                summary = inspect.cleandoc(method.__doc__).partition("\n\n")[0]
                table.add_row(one, kind, " ".join(summary.split()), " ".join(numbers_of(method)))
        cli.show(table)
        return
    matching = {kind: registry[name] for kind, registry in known.items() if name in registry}
    if not matching:
        names = dict.fromkeys(one for registry in known.values() for one in registry)
        raise PermpruneError(f'there is no method "{name}": {nearest(name, names)}')
    for kind, method in matching.items():
        _show_method(f"{kind} {name}", method)


def _show_method(title: str, method: Any) -> None:
    """Print the docstrings of a method and of the classes that its options come from, and its options."""
    numbers, table = numbers_of(method), Table("option", "default", "values", title=f"options of the {title}")
    for kind in method.__mro__:
        if kind is method or numbers.keys() & vars(kind).get("__annotations__", {}).keys():
            print(inspect.cleandoc(kind.__doc__), end="\n\n")
    for option, number in numbers.items():
        table.add_row(option, json.dumps(getattr(method, option)), str(number))
    if numbers:
        cli.show(table)
