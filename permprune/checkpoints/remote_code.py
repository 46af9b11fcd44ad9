"""Classes of models that come as Python code beside the weights, which is run only for who trusts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

UNTRUSTED = "it comes with code of its own, which loading it would run: read that, and give --trust-remote-code"
"""Why a checkpoint with code does not load by default."""


def code_class(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel] | None:
    """The class that a checkpoint's own code defines for the model of this config; None where that has none.

    Runs the code. Saving such a model writes the code beside the weights.
    """
    for kind, reference in _classes(config).items():
        found: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(source))
        found.register_for_auto_class(kind)
        return add_generation_mixin_to_remote_model(found)  # type: ignore[no-any-return]
    return None


def has_code_class(config: PreTrainedConfig) -> bool:
    """Whether `code_class` would find one, without running anything."""
    return bool(_classes(config))


def _classes(config: PreTrainedConfig) -> dict[str, str]:
    """Of the `auto_map` of a config those that are the architecture it names, or models without a head if it does not.

    By the kind of model, as "AutoModelForCausalLM", references as "modeling_name.NameForCausalLM".
    """
    references = getattr(config, "auto_map", None)
    if not isinstance(references, dict):
        return {}
    models = {kind: name for kind, name in references.items() if kind.startswith("AutoModel") and isinstance(name, str)}
    if not config.architectures:
        return {kind: name for kind, name in models.items() if kind == "AutoModel"}
    return {kind: name for kind, name in models.items() if name.rpartition(".")[2] == config.architectures[0]}


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Write the code of a model's class, where it came with some, to `folder`; its config then refers to it."""
    if model._auto_class is not None:
        config: Any = model.config
        custom_object_save(model, str(folder), config=config)
