"""The files of Sentence-Transformers: what they say of a checkpoint, and those that are written for one without."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from permprune.checkpoints.companions import MODULES
from permprune.errors import PermpruneError
from permprune.models.pooling import POOLING, POOLINGS, TASK, pooling_asked, pooling_of
from permprune.system.files import write_json
from permprune.system.progress import log
from permprune.zoo.models import MODELS

FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The poolings by the flags of a Pooling module's config, in files of releases before `pooling_mode`."""


WRITING = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING)
"""Classes with a head that predicts tokens, which embeddings do not need, by the classes of configs."""


def encoder_class(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, *, name: str, source: str | Path, task: str | None
) -> type[PreTrainedModel]:
    """Return the class of a checkpoint as a sentence encoder, and name its pooling in the config.

    The pooling is the one that the `task` asks for (`pooling_asked`), or that of the config, or of the files of
    Sentence-Transformers; `source` is a folder or a hub id. A head that predicts tokens is left out, and with a `task`
    any other. `architecture` is returned unchanged for a checkpoint that is no sentence encoder. Raises
    `PermpruneError` for a pooling that is not known, or other than the one asked for.
    """
    asked, named = pooling_asked(task), getattr(config, POOLING, None)
    headless = "labels" not in inspect.signature(architecture.forward).parameters
    heads: list[object] = [mapping.get(type(config), None) for mapping in WRITING]
    writes = architecture in heads
    if asked is None and not (headless or writes):
        return architecture
    pooling = named or _pooling_at(name, source)
    if pooling is not None:
        _require_pooling(name, pooling)
    if asked is not None and not (asked or pooling):
        choices = ", ".join(f"{TASK}:pooling={known}" for known in POOLINGS)
        raise PermpruneError(f"the pooling of {name} is not known: give as its task one of {choices}")
    if asked and pooling not in (None, asked):
        raise PermpruneError(f"{name} pools its tokens by {pooling}, not {asked}: ask for the task {TASK} alone")
    if not (pooling or asked):
        return architecture
    setattr(config, POOLING, pooling or asked)
    encoder = MODEL_MAPPING.get(type(config), None)
    return architecture if headless or not isinstance(encoder, type) else encoder


def write_modules(model: PreTrainedModel, folder: Path) -> None:
    """Write the pooling of a sentence encoder, and the normalisation, as modules of Sentence-Transformers.

    A folder that lists modules is left as it is.
    """
    pooling = pooling_of(model)
    if pooling is None or (folder / MODULES).exists():
        return
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for path in filter(None, kinds):
        (folder / path).mkdir(exist_ok=True)
    flags = {flag: mode == pooling for flag, mode in FLAGS.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config.hidden_size, **flags})
    write_json(folder / MODULES, modules)


def _pooling_at(name: str, source: str | Path) -> object:
    """What the files of a checkpoint call its pooling; None if they say that it is no sentence encoder.

    Modules other than the pooling and the normalisation are left out of what is compared, with a warning.
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
    return pooling or "none"


def _require_pooling(name: str, pooling: object) -> None:
    """Raise `PermpruneError` unless the pooling of a checkpoint is one of `POOLINGS`."""
    if not (isinstance(pooling, str) and pooling in POOLINGS):
        raise PermpruneError(
            f"{name} pools tokens in a way that is not known ({pooling!s:.40}): give an encoder with one of "
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
