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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from permprune.coupling import Site
from permprune.errors import PermpruneError
from permprune.resources import best_device
from permprune.zoo.models import resolve_model

RECORD = "permprune.json"
GATHERED = "gathered.safetensors"
"""Weights of a gathered model: under a name of their own, since without the gathers they would compute nonsense."""


def read_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """A causal language model in fp32 (on the GPU if there is one), its tokenizer, and the type it is stored in.

    `name` is a zoo name, a folder (one that permprune wrote included) or a hub id. Raises `PermpruneError` when it
    does not load.
    """
    source = resolve_model(name)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if (Path(source) / GATHERED).exists():
            model = load(str(source))
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    stored = model.dtype
    return model.float().to(best_device()).eval(), tokenizer, stored


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what loading raises into a `PermpruneError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(f"{name} does not load as a causal language model: {reason}") from error


def load(folder: str | Path) -> PreTrainedModel:
    """The pruned model in a folder that permprune wrote, with its gathers in place if it has any.

    A folded model is a plain checkpoint, which `from_pretrained` loads as well. Raises `PermpruneError` when the
    folder holds no such model.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not record["gathers"]:
        plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        plain.eval()
        return plain
    config = AutoConfig.from_pretrained(folder)
    architecture: type[PreTrainedModel] = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = architecture._from_config(config, dtype=config.dtype or torch.float32)
    load_safetensors(model, folder / GATHERED)
    for gather in record["gathers"]:
        attach_gather(model, gather["output"], gather["inputs"], torch.tensor(gather["order"]))
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


def write_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, gathered: bool, folder: Path
) -> None:
    """Config, weights and tokenizer; weights that need gathers under a name that plain loading does not find."""
    if gathered:
        write_configs(model, folder)
        save_safetensors(model, str(folder / GATHERED))
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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
