"""What the files of Sentence-Transformers say of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from permprune.checkpoints.companions import MODULES
from permprune.errors import PermpruneError
from permprune.models.pooling import POOLINGS
from permprune.system.progress import log
from permprune.zoo.models import MODELS

FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The poolings by the flags of a Pooling module's config, in files of releases before `pooling_mode`."""


def pooling_at(name: str, source: str | Path) -> str | None:
    """Return the pooling of a checkpoint, one of `POOLINGS`; None if it is no sentence encoder.

    `source` is a folder or a hub id. Modules other than the pooling and the normalisation are left out of what is
    compared, with a warning. Raises `PermpruneError` for a pooling that is not known.
    """
    if name in MODELS:
        return MODELS[name].pooling
    modules = _read(source, MODULES)
    if not isinstance(modules, list):
        return None
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules if isinstance(module, dict)}
    if others := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        log.warning("%s: embeddings are compared before its modules %s", name, ", ".join(others))
    if "Pooling" not in kinds:
        return None
    config = _read(source, f"{kinds['Pooling'].get('path')}/config.json") or {}
    named = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)]
    pooling = named[0] if isinstance(named, list) and len(named) == 1 else named
    require_pooling(name, pooling)
    return str(pooling)


def require_pooling(name: str, pooling: object) -> None:
    """Raise `PermpruneError` unless the pooling of a checkpoint is one of `POOLINGS`."""
    if not (isinstance(pooling, str) and pooling in POOLINGS):
        raise PermpruneError(
            f"{name} pools tokens in a way that is not known ({pooling or 'none'!s:.40}): give an encoder with one of "
            f"{', '.join(POOLINGS)}"
        )


def _read(source: str | Path, file: str) -> Any:
    """The JSON of a file of a folder or hub id; None if there is no such file."""
    path = cached_file(
        source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PermpruneError(f"{path} is damaged ({error}): copy it again") from error
