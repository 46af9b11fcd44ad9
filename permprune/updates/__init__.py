"""Updates: how the weights that stay make up for those pruned, one file a method."""

from permprune.errors import PermpruneError
from permprune.updates.base import LayerUpdate, Update
from permprune.updates.none import NoUpdate
from permprune.updates.share import update_network
from permprune.updates.sparsegpt import SparseGPT

UPDATES: dict[str, type[Update]] = {method.name: method for method in (NoUpdate, SparseGPT)}


def update(name: str | Update) -> Update:
    """The method of that name with its defaults. Raises `PermpruneError` listing the names when there is none."""
    if isinstance(name, Update):
        return name
    if name not in UPDATES:
        raise PermpruneError(f'unknown update "{name}": choose one of {", ".join(UPDATES)}')
    return UPDATES[name]()


__all__ = ["UPDATES", "LayerUpdate", "NoUpdate", "SparseGPT", "Update", "update", "update_network"]
