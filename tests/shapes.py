"""The shapes that tensor functions declare, checked whenever a test calls one."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

MODULES = [
    "permprune.pattern",
    "permprune.matching.assignment",
    "permprune.matching.sinkhorn",
    "permprune.calibration.symmetric",
    "permprune.calibration.moments",
    "permprune.calibration.fisher",
    "permprune.saliency.metrics",
    "permprune.updates.base",
    "permprune.updates.methods",
    "permprune.inference.solved",
]
"""Modules whose functions declare shapes, each after those that it imports from."""

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int goes for a float


def check_shapes() -> int:
    """Make every function that declares shapes check them, also where later modules import it; how many there are."""
    count = 0
    for name in MODULES:
        module = importlib.import_module(name)
        for owner in [module, *_own(module, inspect.isclass)]:
            for function in _own(owner, inspect.isfunction, name):
                if any(word in str(function.__annotations__.values()) for word in ("Float[", "Num[", "Int[", "Bool[")):
                    setattr(owner, function.__name__, jaxtyped(function, typechecker=_check))
                    count += 1
    return count


def _own(owner: Any, kind: Callable[[Any], bool], module: str | None = None) -> Iterator[Any]:
    """The classes or functions that a module or a class defines itself."""
    where = module or owner.__name__
    yield from (value for value in vars(owner).copy().values() if kind(value) and value.__module__ == where)
