"""What a model's forward takes, and what its config says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def argument_names(model: PreTrainedModel) -> list[str]:
    """What the model's forward takes by name."""
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def find_config(config: PreTrainedConfig, *fields: str) -> Any:
    """The outermost of a config and those nested in it in which all these fields have a value, or None."""
    having = (one for one in nested_configs(config) if all(getattr(one, field, None) is not None for field in fields))
    return next(having, None)


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it, level by level."""
    level = [config]
    while level:
        yield from level
        level = [value for one in level for value in vars(one).values() if isinstance(value, PreTrainedConfig)]
