"""Where a model comes from and under which licence: only what its own card, config or zoo entry states."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers import PreTrainedModel
from yaml import YAMLError  # type: ignore[import-untyped]

from permprune.system.progress import log
from permprune.zoo.models import HUB_ID, MODELS

CARD = "README.md"


def base_model_of(model: PreTrainedModel, name: str) -> str | None:
    """Return the hub id that a model was read by; None for a folder, a zoo model, or one that was never read."""
    unread = name == type(model).__name__
    return name if HUB_ID.fullmatch(name) and not (unread or name in MODELS or Path(name).exists()) else None


def licence_of(name: str) -> str | None:
    """Return the licence that a model's card or config.json states, as the hub spells it; None if neither does.

    `name` is a zoo name, a folder or a hub id. The card of a hub id is the one in the cache; no request is made.
    """
    if name in MODELS:
        stated: object = MODELS[name].license
    else:
        card, config = (_file(name, file) for file in (CARD, "config.json"))
        stated = (_card_licence(card) if card else None) or (_config_licence(config) if config else None)
    return stated.lower().removeprefix("licenseref-") if isinstance(stated, str) else None


def _file(name: str, file: str) -> Path | None:
    """A file of a model's folder, or of its cached copy."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    cached = try_to_load_from_cache(name, file) if HUB_ID.fullmatch(name) else None
    return Path(cached) if isinstance(cached, str) else None


def _card_licence(path: Path) -> object:
    try:
        return (metadata_load(path) or {}).get("license")
    except (OSError, ValueError, YAMLError) as error:
        log.warning("%s: its metadata cannot be read, so its licence is not known (%s)", path, error)
        return None


def _config_licence(path: Path) -> object:
    config = json.loads(path.read_text(encoding="utf-8"))  # the model was loaded with it
    return config.get("license") if isinstance(config, dict) else None
