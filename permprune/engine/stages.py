"""The stages of a session, in the order in which it makes them."""

from __future__ import annotations

from collections.abc import Iterable

from permprune.config import PruneConfig
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuter
from permprune.system.stages import CALIBRATE, DENSE, MEASURE, NATURAL, PACK, READ, UPDATE, WRITE
from permprune.updates.base import NoUpdate
from permprune.updates.registry import update


def stages_of_pruning(config: PruneConfig, *, streamed: bool, packed: bool) -> list[str]:
    """The stages of `Session.prune`, and of writing the model."""
    searched = _searched(permuter(config.permute), config)
    held = [CALIBRATE, DENSE, NATURAL, *searched]
    tried = [DENSE, *searched, NATURAL] if streamed else held  # layer by layer the search calibrates
    return [READ, *tried, MEASURE, WRITE, *([PACK] if packed else [])]


def stages_of_attempts(methods: Iterable[Permuter], config: PruneConfig) -> list[str]:
    """The stages of a session that attempts methods one after the other."""
    return [READ, CALIBRATE, DENSE, *(name for one in methods for name in (*_searched(one, config), MEASURE))]


def _searched(method: Permuter, config: PruneConfig) -> list[str]:
    return [*method.stages, *([] if isinstance(update(config.update), NoUpdate) else [UPDATE])]
