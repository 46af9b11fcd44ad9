"""Model classes defined by custom code in the checkpoint, which runs only if the user trusts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

UNTRUSTED = "it comes with its own Python code, which loading would run: read it, then give --trust-remote-code"
"""The reason given in the error if a checkpoint with custom code is loaded without `trust_remote_code`."""


def code_class(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel] | None:
    """The model class that a checkpoint's custom code defines for this config; None if there is no such code.

    Runs the code. Saving a model of this class writes the code next to the weights.
    """
    for kind, reference in _classes(config).items():
        architecture: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(source))
        architecture.register_for_auto_class(kind)
        return add_generation_mixin_to_remote_model(architecture)  # type: ignore[no-any-return]
    return None


def has_code_class(config: PreTrainedConfig) -> bool:
    """Whether `code_class` would return a class; does not run the code."""
    return bool(_classes(config))


def _classes(config: PreTrainedConfig) -> dict[str, str]:
    """The entries of a config's `auto_map` for its architecture, or for "AutoModel" if it names no architecture.

    Keys are auto classes, e.g. "AutoModelForCausalLM"; values are references, e.g. "modeling_name.NameForCausalLM".
    """
    references = getattr(config, "auto_map", None)
    if not isinstance(references, dict):
        return {}
    models = {kind: name for kind, name in references.items() if kind.startswith("AutoModel") and isinstance(name, str)}
    if not config.architectures:
        return {kind: name for kind, name in models.items() if kind == "AutoModel"}
    return {kind: name for kind, name in models.items() if name.rpartition(".")[2] == config.architectures[0]}


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's custom code, if it has any, to `folder`, and refer to it in the model's config."""
    if model._auto_class is not None:
        config: Any = model.config
        custom_object_save(model, str(folder), config=config)
