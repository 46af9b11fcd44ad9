"""Registry of weight updates by name."""

from __future__ import annotations

from permprune.registry import method_of
from permprune.updates.admm import ADMM
from permprune.updates.base import NoUpdate, Update
from permprune.updates.sparsegpt import SparseGPT

UPDATES: dict[str, type[Update]] = {method.name: method for method in (NoUpdate, SparseGPT, ADMM)}


def update(given: str | Update) -> Update:
    """Return the update of a name such as "sparsegpt:damping=0.1"; an object is returned as it is (`method_of`)."""
    return method_of(given, Update, UPDATES)  # type: ignore[type-abstract]
