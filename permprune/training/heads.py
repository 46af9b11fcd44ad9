"""Heads for models that have none: classifiers of images or sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from permprune.checkpoints.origin import carry_over
from permprune.errors import PermpruneError
from permprune.models.forward import argument_names
from permprune.system.device import compute_device


def with_head(model: PreTrainedModel, classes: Sequence[str]) -> PreTrainedModel:
    """Return a classifier of these classes with the weights of a model without a head; a model with a head as it is.

    The classifier shares the model's weights, and its gathers in gather mode; its head is that of Transformers for
    images or sentences. In both cases the configuration gets the names of the classes. Raises `PermpruneError` if
    Transformers has no head for such a model.
    """
    names = dict(enumerate(classes))
    if "labels" not in argument_names(model):
        model = _headed(model, len(names))
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    return model


def _headed(model: PreTrainedModel, classes: int) -> PreTrainedModel:
    images = model.main_input_name == "pixel_values"
    kind: Any = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    config = _mapped(model.config, kind)
    config.num_labels = classes
    headed: PreTrainedModel = kind.from_config(config, dtype=model.dtype, trust_remote_code=False)
    keys, weights = headed.state_dict().keys(), model.state_dict(keep_vars=True)
    prefixes = ["", *(f"{name}." for name, _ in headed.named_children())]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in keys for name in weights))
    shared = {prefix + name: weight for name, weight in weights.items() if prefix + name in keys}
    missing = {key.partition(".")[0] for key in keys - shared.keys()}
    if len(missing) != 1:
        raise PermpruneError(
            f"a {type(headed).__name__} has {len(missing)} parts that the model does not have: give a model with a head"
        )
    headed.load_state_dict(shared, strict=False, assign=True)
    headed.to(compute_device(model)).eval()  # type: ignore[arg-type]
    carry_over(model, headed, lambda name: prefix + name)
    return headed


def _mapped(config: PreTrainedConfig, kind: Any) -> PreTrainedConfig:
    """Return a config that models of this kind accept: a copy of `config`, or one of a model with it as a part."""
    known = kind._model_mapping.keys()
    if type(config) in known:
        return type(config).from_dict(config.to_dict())
    for whole in known:
        for name, nested in whole.sub_configs.items():
            if nested is type(config):
                mapped: PreTrainedConfig = whole(**{name: config.to_dict()})
                return mapped
    raise PermpruneError(
        f"Transformers has no {kind.__name__} with a {type(config).__name__}: give a model with a head"
    )
