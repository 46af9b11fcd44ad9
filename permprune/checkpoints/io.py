"""Read models, and write pruned models so that they can be loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_model as save_safetensors
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from permprune.checkpoints.companions import copy_companions, encoder_class, fetch_companions, write_modules
from permprune.checkpoints.gathers import attach_gathers, gather_buffers
from permprune.checkpoints.origin import Origin, origin_of, recorded_patterns, set_origin
from permprune.checkpoints.probe import read_probe, require_digests
from permprune.checkpoints.record import RECORD, Record, read_record
from permprune.checkpoints.schema import Malformed
from permprune.checkpoints.weights import GATHERED, ModelFiles, damage, require_buildable, stop_transformers
from permprune.errors import PermpruneError, first_line
from permprune.models.forward import stored_as
from permprune.models.layers import is_packed
from permprune.models.processors import Processor, read_processor
from permprune.system.device import best_device
from permprune.system.failures import failures_reported
from permprune.zoo.models import resolve_model
from permprune.zoo.packages import cache_root

WRITTEN = "the written model"
"""The name in error messages of a model that is checked before its folder appears."""

CONFIG, PROCESSOR, WEIGHTS = "its config: ", "its tokenizer or processor: ", "its weights: "
"""Prefixes of error messages, for the part of a model that does not load."""

UNTRUSTED = "it comes with its own Python code, which loading would run: read it, then give --trust-remote-code"
"""The reason given in the error if a checkpoint with custom code is loaded without `trust_remote_code`."""


@failures_reported()
def read_model(
    name: str, *, task: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Processor | None, torch.dtype]:
    """Load a model in fp32 (on the GPU if there is one), its processor, and the dtype of the stored weights.

    Packed models keep the types in which they are stored.

    `name` is a zoo name, a folder (dense or written by permprune) or a hub id. The processor is a tokenizer, an image
    processor, a feature extractor or a combination; None if the folder has none. With the `task` "embedding", or
    "embedding:pooling=cls", the model is read as a sentence encoder, as one with the files of Sentence-Transformers is
    without it. Custom code of a checkpoint runs only with `trust_remote_code`. Raises `PermpruneError` if a part does
    not load, or if the checkpoint's weights do not match its config.json.
    """
    model, processor = read_as_stored(name, task=task, trust_remote_code=trust_remote_code)
    stored = model.dtype
    if not is_packed(model):
        model.float()
    return model, processor, stored


def read_as_stored(
    name: str, *, task: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Processor | None]:
    """Like `read_model`, but the weights keep the types in which they are stored."""
    checkpoint, processor = open_checkpoint(name, trust_remote_code, task)
    folder = Path(checkpoint.source)
    if any((folder / file).exists() for file in (RECORD, GATHERED)):
        model = _load_pruned(checkpoint, read_record(folder))
    else:
        with loading(name, folder, WEIGHTS):
            model = checkpoint.load_on(best_device())
        set_origin(model, Origin(name, model.dtype))
    nn.Module.to(model, best_device())  # PreTrainedModel.to raises for packed models, though they can be moved
    return model.eval(), processor


def open_checkpoint(
    name: str, trust_remote_code: bool = False, task: str | None = None
) -> tuple[ModelFiles, Processor | None]:
    """Read a model's config and its processor, and have the files beside its weights in the cache.

    `name` and `task` are those of `read_model`. Raises `PermpruneError` if a part does not load.
    """
    source = resolve_model(name)
    # First: without a model this fails after one request.
    checkpoint = read_config(name, source, trust_remote_code, task)
    with loading(name, source, PROCESSOR):
        processor = read_processor(source, trust_remote_code)
    if not Path(source).exists():
        fetch_companions(str(source))
    return checkpoint, processor


def read_config(name: str, source: str | Path, trust_remote_code: bool = False, task: str | None = None) -> ModelFiles:
    """Read the model class and the config of the checkpoint at `source`, a folder or hub id.

    The class is the one named in the config's `architectures`, or the one without a head if none is named. With
    `trust_remote_code`, the checkpoint's own class is used if it comes with code. A sentence encoder, which files of
    the checkpoint or the `task` make one, is read without a head (`encoder_class`). `name` is the model's name in error
    messages. Raises `PermpruneError` if Transformers has no such class, or the config is invalid.
    """
    with loading(name, source, CONFIG):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        require_buildable(config, source)
        architecture = code_class(config, source) if trust_remote_code else None
        if architecture is None:
            architecture = _named_class(name, config)
            kind = architecture.config_class
            if kind is not None and not isinstance(config, kind):  # config of a composite model that contains this one
                config = kind.from_pretrained(source)
        architecture = encoder_class(architecture, config, name=name, source=source, task=task)
        return ModelFiles(name, source, architecture, config, trust_remote_code)


def _named_class(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The Transformers class that a config names.

    Raises `PermpruneError` if there is no such class, and `ValueError` if the config is damaged.
    """
    match config.architectures:
        case [str(named), *_]:
            kind = getattr(transformers, named, None)
        case None | []:
            named = f"model without a head of type {config.model_type}"
            kind = transformers.MODEL_MAPPING.get(type(config), None)
            kind = kind[0] if isinstance(kind, tuple) else kind
        case other:
            raise ValueError(f"architectures is {other!r}, not a list of names")
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel:
        return kind
    if _classes(config):
        raise PermpruneError(f"{name} does not load: {UNTRUSTED}")
    raise PermpruneError(f"{name} holds a {named}, which Transformers {transformers.__version__} does not have")


@contextmanager
def loading(name: str, source: str | Path, part: str) -> Iterator[None]:
    """Context manager that converts any error from loading a part of a model into a `PermpruneError` naming the file.

    `name` is the model's name in the message and `source` the folder or hub id it is loaded from. If `source` is in the
    cache, the message says how to clear it. `part` is one of `CONFIG`, `PROCESSOR` and `WEIGHTS`. A `PermpruneError`
    is about damage only if it is raised for weights; what is wrong with a sound config is what was asked of it.
    """
    cure = ""
    if Path(source).is_relative_to(cache_root()):
        cure = f"; the cached copy is damaged: delete {source}, and it will be created again"
    try:
        yield
    except PermpruneError as error:
        if cure and part == WEIGHTS:
            raise PermpruneError(f"{error}{cure}") from error
        raise
    except Exception as error:  # on a damaged file, Transformers, tokenizers and safetensors can raise any type
        if "trust_remote_code" in str(error):
            raise PermpruneError(f"{name} does not load: {UNTRUSTED}") from error
        fault = damage(source, weights=part == WEIGHTS) or f"{part}{first_line(error)}"
        raise PermpruneError(f"{name} does not load: {fault}{cure}") from error


@failures_reported()
def load(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a pruned model from a folder that permprune wrote, and attach its gathers if it has any.

    A model without gathers is an ordinary checkpoint, which `from_pretrained` loads as well. `save` writes the model
    again. Custom code of a checkpoint runs only with `trust_remote_code`. Raises `PermpruneError` if the folder does
    not contain a model written by permprune, or if its weights are not those that permprune wrote.
    """
    record = read_record(folder)
    return _load_pruned(read_config(str(folder), Path(folder), trust_remote_code), record)


def load_written(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`load` the folder that a model was just written to, with the class of that model."""
    return _load_pruned(written_checkpoint(model, folder), read_record(folder))


def written_checkpoint(model: PreTrainedModel, folder: Path) -> ModelFiles:
    """The checkpoint that a model was just written to, with the class of that model, whose code runs already."""
    with loading(WRITTEN, folder, CONFIG):
        return ModelFiles(WRITTEN, folder, type(model), type(model.config).from_pretrained(folder))


def _load_pruned(checkpoint: ModelFiles, record: Record) -> PreTrainedModel:
    folder = Path(checkpoint.source)
    gathered = _is_gathered(folder, record)
    with loading(checkpoint.name, folder, WEIGHTS):
        model = checkpoint.load_file(folder / GATHERED) if gathered else checkpoint.load()
    require_digests(folder, record.digests)
    try:
        recorded_patterns(model, record.layers)
        attach_gathers(model, record.gathers)
    except Malformed as error:
        raise PermpruneError(f"{folder / RECORD} does not fit the model: {error}") from error
    set_origin(model, Origin(checkpoint.name, model.dtype, record, read_probe(folder, model.dtype)))
    return model


def _is_gathered(folder: Path, record: Record) -> bool:
    """Whether the weights in a folder need gathers. Raises `PermpruneError` if the weights and the record disagree."""
    if (folder / GATHERED).exists() == bool(record.gathers):
        return bool(record.gathers)
    lacking, other = (GATHERED, RECORD) if record.gathers else ("gathers in its " + RECORD, GATHERED)
    raise PermpruneError(f"{folder} lacks {lacking}, which its {other} needs: copy it again, or prune the model again")


def write_weights(model: PreTrainedModel, processor: Processor | None, dtype: torch.dtype, folder: Path) -> None:
    """Write a model's config, its weights converted to `dtype`, and the files beside them to `folder`.

    Weights that need gathers are written under a file name that `from_pretrained` does not find.
    """
    with stored_as(model, dtype):
        if gather_buffers(model):
            write_configs(model, folder)
            save_safetensors(model, str(folder / GATHERED))
            stop_transformers(folder, GATHERED)
        else:
            model.save_pretrained(folder)
    write_beside(model, processor, folder)


def write_beside(model: PreTrainedModel, processor: Processor | None, folder: Path) -> None:
    """Write a model's processor, and what else is beside the weights that it was read from (`copy_companions`)."""
    if processor is not None:
        processor.save_pretrained(folder)
    copy_companions(origin_of(model).name, folder)
    write_modules(model, folder)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write the config files that `save_pretrained` writes, and custom code, if there is any, without the weights."""
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if model._auto_class is not None:
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def code_class(config: PreTrainedConfig, source: str | Path) -> type[PreTrainedModel] | None:
    """The model class that a checkpoint's custom code defines for this config; None if there is no such code.

    Runs the code. Saving a model of this class writes the code next to the weights.
    """
    for kind, reference in _classes(config).items():
        architecture: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(source))
        architecture.register_for_auto_class(kind)
        return add_generation_mixin_to_remote_model(architecture)  # type: ignore[no-any-return]
    return None


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
