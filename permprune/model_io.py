"""Reading models, and writing pruned ones so that they load again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from permprune.coupling import Site
from permprune.errors import PermpruneError
from permprune.models.damage import damage, first_line
from permprune.models.remote_code import UNTRUSTED, code_class, has_code_class, write_code
from permprune.models.weights import load_whole, load_whole_file
from permprune.processors import Processor, read_processor
from permprune.resources import best_device
from permprune.zoo.cache import cache_root
from permprune.zoo.models import resolve_model

RECORD = "permprune.json"
GATHERED = "gathered.safetensors"
"""Weights of a gathered model: under a name of their own, since without the gathers they would compute nonsense."""

PROCESSOR, WEIGHTS = "its tokenizer or processor: ", "its weights: "
"""Parts of a model that are loaded one after the other, as errors begin with them."""


def read_model(name: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Processor | None, torch.dtype]:
    """A model in fp32 (on the GPU if there is one), its processor, and the type it is stored in.

    `name` is a zoo name, a folder (one that permprune wrote included) or a hub id. The processor is a tokenizer, an
    image processor, a feature extractor or what joins them; None for a folder without. Code that comes with a
    checkpoint is run only with `trust_remote_code`. Raises `PermpruneError` when something does not load, or when the
    checkpoint and its config.json do not have the same weights.
    """
    source = resolve_model(name)
    with loading(name, source):
        read_config(source, trust_remote_code)  # asks the hub once whether there is such a model, the processor often
    with loading(name, source, PROCESSOR):
        processor = read_processor(source, trust_remote_code)
    if (Path(source) / GATHERED).exists():
        model = load(source, trust_remote_code=trust_remote_code)
    else:
        model = _load_plain(name, source, trust_remote_code)
    stored = model.dtype
    return model.float().to(best_device()).eval(), processor, stored


def read_config(source: str | Path, trust_remote_code: bool = False) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of the model in a folder or hub id, and its config.

    The class is the one that the checkpoint names, or, where it names none, the one without a head. With
    `trust_remote_code` that is the checkpoint's own if it comes with code. Raises `PermpruneError` when there is no
    such class, and what Transformers raises.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if trust_remote_code and (own := code_class(config, source)):
        return own, config
    if config.architectures:
        name = str(config.architectures[0])
        found = getattr(transformers, name, None)
    else:
        name = f"model without a head of type {config.model_type}"
        found = transformers.MODEL_MAPPING.get(type(config), None)
        found = found[0] if isinstance(found, tuple) else found
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise PermpruneError(
            f"{source} does not load: {UNTRUSTED}"
            if has_code_class(config)
            else f"{source} holds a {name}, which Transformers {transformers.__version__} does not have"
        )
    kind = found.config_class
    if kind is not None and not isinstance(config, kind):  # the config of a whole of which the model is a part
        config = kind.from_pretrained(source)
    return found, config


@contextmanager
def loading(name: str, source: str | Path, part: str = "") -> Iterator[None]:
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


def load(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The pruned model in a folder that permprune wrote, with its gathers in place if it has any.

    A folded model is a plain checkpoint, which `from_pretrained` loads as well. `trust_remote_code` is as that of
    `read_model`. Raises `PermpruneError` when the folder holds no such model.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not record["gathers"]:
        return _load_plain(str(folder), folder, trust_remote_code)
    with loading(str(folder), folder, WEIGHTS):
        model = load_whole_file(str(folder), *read_config(folder, trust_remote_code), folder / GATHERED)
    for gather in record["gathers"]:
        attach_gather(model, gather["output"], gather["inputs"], torch.tensor(gather["order"]))
    model.eval()
    return model


def _load_plain(name: str, source: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    with loading(name, source, WEIGHTS):
        architecture, config = read_config(source, trust_remote_code)
        model = load_whole(name, architecture, config, source, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def read_record(folder: str | Path) -> dict[str, Any]:
    """The permprune.json of a folder. Raises `PermpruneError` when there is none, or it is damaged."""
    path = Path(folder) / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PermpruneError(f"{folder} holds no {RECORD}: give a folder that permprune wrote") from error
    except (OSError, ValueError) as error:
        raise PermpruneError(f"{path} cannot be read: prune the model again") from error
    return record


def write_weights(model: PreTrainedModel, processor: Processor | None, gathered: bool, folder: Path) -> None:
    """Config, weights and processor; weights that need gathers under a name that plain loading does not find."""
    if gathered:
        write_configs(model, folder)
        save_safetensors(model, str(folder / GATHERED))
    else:
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    write_code(model, folder)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def gather_places(site: Site, readers: list[str]) -> tuple[str, list[str]]:
    """Where the gather of a site stands: (a module whose output it reorders, []) or ("", modules whose inputs).

    `readers` are the modules that follow its order; if others read the site too, its output must stay as it is.
    """
    alone = len(readers) == len(site.readers)
    return (site.gather[1], []) if site.gather[0] == "output" and alone else ("", readers)


def attach_gather(model: nn.Module, output: str, inputs: list[str], order: Tensor) -> None:
    """Reorder channels at run time: those of one module's output, or of several modules' inputs.

    `order` is int64 (channels,); it becomes a non-persistent buffer beside the module, so that it moves with the model.
    """

    def after(module: nn.Module, _args: object, result: Tensor) -> Tensor:
        return result.index_select(-1, module.channel_order)  # type: ignore[arg-type]

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_select(-1, module.channel_order), *args[1:])  # type: ignore[arg-type]

    for name in [output] if output else inputs:
        module = model.get_submodule(name)
        module.register_buffer("channel_order", order, persistent=False)
        if output:
            module.register_forward_hook(after)
        else:
            module.register_forward_pre_hook(before)
