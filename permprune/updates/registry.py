"""Weight updates by name."""

from __future__ import annotations

from permprune.errors import PermpruneError
from permprune.options import nearest
from permprune.updates.base import Update
from permprune.updates.none import NoUpdate
from permprune.updates.sparsegpt import SparseGPT

UPDATES: dict[str, type[Update]] = {method.name: method for method in (NoUpdate, SparseGPT)}


def update(name: str | Update) -> Update:
    """The method of that name with its defaults. Raises `PermpruneError` listing the names when there is none."""
    if isinstance(name, Update):
        return name
    if name not in UPDATES:
        raise PermpruneError(f'unknown update "{name}": {nearest(name, UPDATES)}')
    return UPDATES[name]()
