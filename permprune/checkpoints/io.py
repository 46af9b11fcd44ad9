"""Reading models, and writing pruned ones so that they load again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_model as save_safetensors
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from permprune.checkpoints.damage import damage, first_line
from permprune.checkpoints.gathers import attach_gathers, has_gathers
from permprune.checkpoints.origin import Origin, set_origin
from permprune.checkpoints.patterns import recorded_patterns
from permprune.checkpoints.probe import PROBE, read_probe
from permprune.checkpoints.record import RECORD, Record, read_record
from permprune.checkpoints.remote_code import UNTRUSTED, code_class, has_code_class, write_code
from permprune.checkpoints.schema import Malformed
from permprune.checkpoints.weights import load_whole, load_whole_file, require_fewer_layers
from permprune.errors import PermpruneError
from permprune.models.processors import Processor, read_processor
from permprune.system.device import best_device
from permprune.system.out_of_memory import memory_reported
from permprune.zoo.cache import cache_root
from permprune.zoo.models import resolve_model

GATHERED = "gathered.safetensors"
"""Weights of a gathered model: under a name of their own, since without the gathers they would compute nonsense."""

CONFIG, PROCESSOR, WEIGHTS = "its config: ", "its tokenizer or processor: ", "its weights: "
"""Parts of a model that are loaded one after the other, as errors begin with them."""


@memory_reported()
def read_model(name: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Processor | None, torch.dtype]:
    """A model in fp32 (on the GPU if there is one), its processor, and the type it is stored in.

    `name` is a zoo name, a folder (one that permprune wrote included) or a hub id. The processor is a tokenizer, an
    image processor, a feature extractor or what joins them; None for a folder without. Code that comes with a
    checkpoint is run only with `trust_remote_code`. Raises `PermpruneError` when something does not load, or when the
    checkpoint and its config.json do not have the same weights.
    """
    source = resolve_model(name)
    read_config(name, source, trust_remote_code)  # asks the hub once whether there is such a model, a processor often
    with loading(name, source, PROCESSOR):
        processor = read_processor(source, trust_remote_code)
    if any((Path(source) / file).exists() for file in (RECORD, GATHERED)):
        model = _load_pruned(name, Path(source), trust_remote_code)
    else:
        model = _load_plain(name, source, trust_remote_code)
        set_origin(model, Origin(name, model.dtype))
    stored = model.dtype
    nn.Module.float(model)  # Transformers' own refuses packed models, which bear it
    nn.Module.to(model, best_device())
    return model.eval(), processor, stored


def read_config(
    name: str, source: str | Path, trust_remote_code: bool = False
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of the model of that name, which is read from `source`, a folder or hub id, and its config.

    The class is the one that the checkpoint names, or, where it names none, the one without a head. With
    `trust_remote_code` that is the checkpoint's own if it comes with code. Raises `PermpruneError` when there is no
    such class, or no config that a checkpoint can have.
    """
    with loading(name, source, CONFIG):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        require_fewer_layers(config, source)
        if trust_remote_code and (own := code_class(config, source)):
            return own, config
        found = _named_class(name, config)
        kind = found.config_class
        if kind is not None and not isinstance(config, kind):  # the config of a whole of which the model is a part
            config = kind.from_pretrained(source)
        return found, config


def _named_class(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of Transformers that a config names. Raises `PermpruneError` when there is none."""
    match config.architectures:
        case [str(named), *_]:
            found = getattr(transformers, named, None)
        case None | []:
            named = f"model without a head of type {config.model_type}"
            found = transformers.MODEL_MAPPING.get(type(config), None)
            found = found[0] if isinstance(found, tuple) else found
        case other:
            raise PermpruneError(f"{name} does not load: architectures in its config is {other!r}, no list of names")
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel:
        return found
    if has_code_class(config):
        raise PermpruneError(f"{name} does not load: {UNTRUSTED}")
    raise PermpruneError(f"{name} holds a {named}, which Transformers {transformers.__version__} does not have")


@contextmanager
def loading(name: str, source: str | Path, part: str) -> Iterator[None]:
    """Turn what loading a part of a model raises into a `PermpruneError` that says which file is at fault.

    `source` is where the model of that name is read from; where it is the cache, the error says how to clear that.
    """
    cure = ""
    if Path(source).is_relative_to(cache_root()):
        cure = f"; the cached copy is at fault: remove {source}, and it is made anew"
    try:
        yield
    except PermpruneError as error:
        raise PermpruneError(f"{error}{cure}") from error
    except Exception as error:  # Transformers, tokenizers and safetensors raise whatever a damaged file leads them to
        if "trust_remote_code" in str(error):
            raise PermpruneError(f"{name} does not load: {UNTRUSTED}") from error
        fault = damage(source, weights=part == WEIGHTS) or f"{part}{first_line(error)}"
        raise PermpruneError(f"{name} does not load: {fault}{cure}") from error


@memory_reported()
def load(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The pruned model in a folder that permprune wrote, with its gathers in place if it has any.

    A folded model is a plain checkpoint, which `from_pretrained` loads as well. `save` writes the model again.
    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError` when the folder holds no such model, or a
    damaged one.
    """
    return _load_pruned(str(folder), Path(folder), trust_remote_code)


def _load_pruned(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    record = read_record(folder)
    if _is_gathered(folder, record):
        path = folder / GATHERED
        architecture, config = read_config(name, folder, trust_remote_code)
        with loading(name, folder, WEIGHTS):
            model = load_whole_file(str(path), architecture, config, path)
        model.eval()
    else:
        model = _load_plain(name, folder, trust_remote_code)
    try:
        recorded_patterns(model, record.layers)
        attach_gathers(model, record.gathers)
    except Malformed as error:
        raise PermpruneError(f"{folder / RECORD} does not fit the model: {error}") from error
    probe = read_probe(folder) if (folder / PROBE).exists() else {}
    set_origin(model, Origin(name, model.dtype, record, probe))
    return model


def _load_plain(name: str, source: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    architecture, config = read_config(name, source, trust_remote_code)
    with loading(name, source, WEIGHTS):
        model = load_whole(name, architecture, config, source, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def _is_gathered(folder: Path, record: Record) -> bool:
    """Whether the weights of a folder go with gathers. Raises `PermpruneError` when only one of the two is there."""
    if (folder / GATHERED).exists() == bool(record.gathers):
        return bool(record.gathers)
    lacking, other = (GATHERED, RECORD) if record.gathers else ("gathers in its " + RECORD, GATHERED)
    raise PermpruneError(f"{folder} lacks {lacking}, which its {other} needs: copy it again, or prune the model again")


def write_weights(model: PreTrainedModel, processor: Processor | None, dtype: torch.dtype, folder: Path) -> None:
    """Config, weights in type `dtype` and processor.

    Weights that need gathers go under a name that plain loading does not find.
    """
    with stored_as(model, dtype):
        if has_gathers(model):
            write_configs(model, folder)
            save_safetensors(model, str(folder / GATHERED))
        else:
            model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


@contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the model's floating-point tensors are rounded to a type; after it they are as before."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(dtype)
        for owner, name, buffer in buffers:
            owner[name] = buffer.to(dtype)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, name, buffer in buffers:
            owner[name] = buffer


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """The configs that `save_pretrained` writes."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    write_code(model, folder)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
