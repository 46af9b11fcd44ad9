"""Models whose weights stay on disk: each module's are read when it runs, and let go after it."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.io import GATHERED, PROCESSOR, WEIGHTS, loading, read_config, write_configs
from permprune.checkpoints.origin import Origin, set_origin
from permprune.checkpoints.weights import load_whole, whole_skeleton
from permprune.models.layers import canonical_names
from permprune.models.processors import Processor, read_processor
from permprune.system.device import best_device
from permprune.zoo.models import resolve_model

Edit = Callable[[str, Tensor], Tensor]
"""(name, tensor) -> what the model is given in its place; the tensor is its own to change."""

SHARD = 5 * 10**9
"""Bytes of weights in one file of a checkpoint, at most."""

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""Names of types in safetensors files."""


class StoredWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, fp32, read from disk when asked for and as `edit` makes them.

    Tied weights go by any of their names; `edit` is given the first of them.
    """

    def __init__(self, stored: Mapping[str, Tensor], canonical: Mapping[str, str]) -> None:
        self.stored, self.canonical = stored, canonical
        self.edit: Edit | None = None

    def __getitem__(self, name: str) -> Tensor:
        name = self.canonical.get(name, name)
        tensor = self.stored[name].to(best_device(), torch.float32, copy=True)
        return tensor if self.edit is None else self.edit(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def read_skeleton(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of that name without weights, on the meta device.

    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError`, and where the weights are not those of the
    model.
    """
    source = resolve_model(name)
    architecture, config = read_config(name, source, trust_remote_code)
    with loading(name, source, WEIGHTS):
        if not (Path(source) / GATHERED).exists():
            return whole_skeleton(name, architecture, config, source, trust_remote_code=trust_remote_code)[0]
        with torch.device("meta"):
            model: PreTrainedModel = architecture._from_config(config)
    model.to("meta")  # type: ignore[arg-type]  # some parameters are made where no default device is heeded
    return model


def read_offloaded(
    name: str, folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Processor | None, torch.dtype, StoredWeights]:
    """What `read_model` gives, with the parameters on the meta device, and the weights beside it.

    The model runs once `attach` has given it weights. Where Transformers stores weights otherwise than it computes with
    them (fused experts), they are written anew to `folder`. `trust_remote_code` is as that of `read_model`. Raises
    `PermpruneError`, and when there are no safetensors.
    """
    source = resolve_model(name)
    architecture, config = read_config(name, source, trust_remote_code)
    with loading(name, source, PROCESSOR):
        processor = read_processor(source, trust_remote_code)
    options = {"device_map": {"": "disk"}, "offload_folder": str(folder), "use_safetensors": True}
    with loading(name, source, WEIGHTS):
        model = load_whole(name, architecture, config, source, trust_remote_code=trust_remote_code, **options)
    hooks: list[Any] = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    stored = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    remove_hook_from_submodules(model)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(best_device())
    dtype = model.dtype
    set_origin(model, Origin(name, dtype))
    _convert(model, torch.float32)
    return model.eval(), processor, dtype, StoredWeights(stored, canonical_names(model))


def attach(model: PreTrainedModel, weights: StoredWeights) -> None:
    """From now on every module of the model reads its own parameters from `weights` whenever it runs."""
    attach_align_device_hook(model, execution_device=best_device(), offload=True, weights_map=weights)


def write_offloaded(
    model: PreTrainedModel,
    processor: Processor | None,
    weights: StoredWeights,
    dtype: torch.dtype,
    gathered: bool,
    folder: Path,
    memory: int,
) -> None:
    """What `write_weights` writes, in type `dtype`, holding at most half of `memory` bytes, or else one tensor."""
    _convert(model, dtype)
    if gathered:
        write_configs(model, folder)
        _save_in_turn(model, weights, folder / GATHERED)
    else:
        edit = weights.edit
        weights.edit = lambda name, tensor: (tensor if edit is None else edit(name, tensor)).to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, max_shard_size=min(memory // 2, SHARD))
    if processor is not None:
        processor.save_pretrained(folder)


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters another type and tie those that belong together, which converting or running took apart."""
    model.to(dtype)  # type: ignore[arg-type]
    model.tie_weights()


def _save_in_turn(model: PreTrainedModel, weights: StoredWeights, path: Path) -> None:
    """One safetensors file with all of the model's tensors, in the model's types, of which one at a time is held."""
    tensors = {name: t for name, t in model.state_dict().items() if weights.canonical.get(name, name) == name}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            whole = weights[name].to(tensor.dtype) if tensor.is_meta else tensor
            file.write(whole.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
