"""The arguments of a model's forward, and values in its (nested) config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def argument_names(model: PreTrainedModel) -> list[str]:
    """The names of the keyword arguments of the model's forward."""
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def find_config(config: PreTrainedConfig, *fields: str) -> Any:
    """The outermost config, among a config and those nested in it, in which no field is None; None if there is none."""
    having = (one for one in nested_configs(config) if all(getattr(one, field, None) is not None for field in fields))
    return next(having, None)


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and all configs nested in it, breadth first."""
    level = [config]
    while level:
        yield from level
        level = [value for one in level for value in vars(one).values() if isinstance(value, PreTrainedConfig)]
