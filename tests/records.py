"""Records of pruned models that tests make up."""

from typing import Any

from permprune.checkpoints.record import FORMAT, Record


def record_of(**fields: Any) -> Record:
    """A record of nothing in particular but for these fields, which are as in JSON."""
    bare: dict[str, Any] = {
        "format": FORMAT,
        "version": "0.1.0",
        "model": "someone/small-model",
        "note": None,
        "settings": {"pattern": "2:4", "order": "random", "update": "none"},
        "versions": {},
        "layers": [],
        "curve": [],
        "permutations": {},
        "gathers": [],
    }
    return Record.of({**bare, **fields})
