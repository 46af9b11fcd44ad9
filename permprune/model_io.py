"""Reading models, and writing pruned ones so that they load again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from permprune.coupling import Site
from permprune.errors import PermpruneError
from permprune.processors import Processor, read_processor
from permprune.resources import best_device
from permprune.zoo.models import resolve_model

RECORD = "permprune.json"
GATHERED = "gathered.safetensors"
"""Weights of a gathered model: under a name of their own, since without the gathers they would compute nonsense."""


def read_model(name: str) -> tuple[PreTrainedModel, Processor | None, torch.dtype]:
    """A model in fp32 (on the GPU if there is one), its processor, and the type it is stored in.

    `name` is a zoo name, a folder (one that permprune wrote included) or a hub id. The processor is a tokenizer, an
    image processor, a feature extractor or what joins them; None for a folder without. Raises `PermpruneError` when
    something does not load.
    """
    source = resolve_model(name)
    with loading(name):
        read_config(source)  # asks the hub once whether there is such a model; the processor asks again for every kind
        processor = read_processor(source)
        model = load(source) if (Path(source) / GATHERED).exists() else _load_plain(source)
    stored = model.dtype
    return model.float().to(best_device()).eval(), processor, stored


def read_config(source: str | Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of the model in a folder or hub id, and its config.

    The class is the one that the checkpoint names, or, where it names none, the one without a head. Raises
    `PermpruneError` when Transformers has no such class.
    """
    config = AutoConfig.from_pretrained(source)
    if config.architectures:
        name = config.architectures[0]
        found = getattr(transformers, name, None)
    else:
        name = f"model without a head of type {config.model_type}"
        found = transformers.MODEL_MAPPING.get(type(config), None)
        found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise PermpruneError(f"{source} holds a {name}, which Transformers {transformers.__version__} does not have")
    return found, config


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what loading raises into a `PermpruneError`."""
    try:
        yield
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PermpruneError(f"{name} does not load: {reason}") from error


def load(folder: str | Path) -> PreTrainedModel:
    """The pruned model in a folder that permprune wrote, with its gathers in place if it has any.

    A folded model is a plain checkpoint, which `from_pretrained` loads as well. Raises `PermpruneError` when the
    folder holds no such model.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not record["gathers"]:
        return _load_plain(folder)
    architecture, config = read_config(folder)
    model: PreTrainedModel = architecture._from_config(config, dtype=config.dtype or torch.float32)
    load_safetensors(model, folder / GATHERED)
    for gather in record["gathers"]:
        attach_gather(model, gather["output"], gather["inputs"], torch.tensor(gather["order"]))
    model.eval()
    return model


def _load_plain(source: str | Path) -> PreTrainedModel:
    architecture, _ = read_config(source)
    model: PreTrainedModel = architecture.from_pretrained(source, dtype="auto")
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
