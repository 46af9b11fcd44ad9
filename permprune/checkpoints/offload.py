"""Models whose weights stay on disk: the weights of each module are read when it runs and freed afterwards."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import attach_gathers
from permprune.checkpoints.io import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    loading,
    open_checkpoint,
    read_config,
    write_beside,
    write_configs,
    written_checkpoint,
)
from permprune.checkpoints.origin import Origin, set_origin
from permprune.checkpoints.probe import require_digests
from permprune.checkpoints.record import RECORD, read_record
from permprune.checkpoints.weights import GATHERED, ModelFiles, require_buildable, stop_transformers
from permprune.errors import PermpruneError
from permprune.models.dummy_inputs import processed_size
from permprune.models.hooks import replaced_while_running
from permprune.models.layers import at_rest, block_linears, canonical_names, values_of
from permprune.models.modality import kind_of
from permprune.models.narrow_weights import end_weights, held_type, is_narrow
from permprune.models.processors import Processor, read_processor
from permprune.system import sharding
from permprune.system.device import best_device
from permprune.system.shelf import Computed, empty_on_host, write_tensors
from permprune.zoo.models import resolve_model

Edit = Callable[[str, Tensor], Tensor]
"""Function (name, tensor) -> tensor that the model gets instead; it may modify the given tensor in place."""

SHARD = 5 * 10**9
"""Maximum number of bytes of weights in one file of a checkpoint."""


class StoredTensors(Computed):
    """The tensors of a checkpoint as they are stored, each read from disk when it is accessed.

    Access raises `PermpruneError` if a file is not as it was when this was made: one that is cut off while it is mapped
    would end the process.
    """

    def __init__(self, loader: Mapping[str, Tensor]) -> None:
        super().__init__(loader, lambda name: loader[name])
        self._index: Mapping[str, Mapping[str, str]] = getattr(loader, "index", {})
        files = {place["safetensors_file"] for place in self._index.values() if "safetensors_file" in place}
        self._signatures = {file: _signature(file) for file in files}

    def __getitem__(self, name: str) -> Tensor:
        self._file(name)
        return super().__getitem__(name)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read only some rows of a tensor."""
        file = self._file(name)
        if file is None:
            return self[name][rows]
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_slice(self._index[name].get("weight_name", name))[rows]
            return tensor

    def _file(self, name: str) -> str | None:
        file = self._index.get(name, {}).get("safetensors_file")
        if file is not None and _signature(file) != self._signatures[file]:
            raise PermpruneError(f"{file} changed during the run: restore it, and continue with --resume")
        return file


def _signature(file: str) -> tuple[int, int] | None:
    """The size of a file and the time of its last change; None if it is gone."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class StoredWeights(Computed):
    """Mapping from names to the tensors of a checkpoint in fp32, each read from disk when it is accessed.

    `edit`, if set, is applied to every tensor read. Tied weights can be accessed by any of their names; `edit` receives
    the first of them.
    """

    def __init__(self, stored: Mapping[str, Tensor], canonical: Mapping[str, str]) -> None:
        self.stored, self.canonical = StoredTensors(stored), canonical
        self.edit: Edit | None = None
        super().__init__(self.stored, self.stored.__getitem__)

    def __getitem__(self, name: str) -> Tensor:
        name = self.canonical.get(name, name)
        tensor = super().__getitem__(name).to(best_device(), torch.float32, copy=True)
        return tensor if self.edit is None else self.edit(name, tensor)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read only some rows of a tensor; `edit` is not applied."""
        tensor = self.stored.rows(self.canonical.get(name, name), rows)
        return tensor.to(best_device(), torch.float32, copy=True)


class CollectedWeights(StoredWeights):
    """Weights of which each process holds some rows, each collected when the first process accesses it.

    `rows_of(name)` returns a copy of the rows that this process holds of a parameter, and the number of all its rows; a
    parameter that is not divided is returned whole. The other processes have to `serve` meanwhile.
    """

    def __init__(
        self, names: Iterable[str], canonical: Mapping[str, str], rows_of: Callable[[str], tuple[Tensor, int]]
    ) -> None:
        super().__init__(dict.fromkeys(names, torch.empty(0)), canonical)
        self.rows_of = rows_of

    def __getitem__(self, name: str) -> Tensor:
        name = self.canonical.get(name, name)
        sharding.broadcast_name(name)
        whole = self._collected(name)
        assert whole is not None  # on the first process
        return whole if self.edit is None else self.edit(name, whole)

    @contextmanager
    def served(self) -> Iterator[None]:
        """A context of the first process, at whose end the others stop to serve."""
        try:
            yield
        finally:
            sharding.broadcast_name(None)

    def serve(self) -> None:
        """Send the rows of this process whenever the first process asks for them, until the end of `served`."""
        while (name := sharding.broadcast_name(None)) is not None:
            self._collected(name)

    def _collected(self, name: str) -> Tensor | None:
        rows, count = self.rows_of(name)
        return rows if len(rows) == count else sharding.gather_on_first(rows, count)


def read_skeleton(name: str, *, task: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model without its weights, on the meta device.

    The arguments are those of `read_model`. Raises `PermpruneError` if the model does not load, or if the checkpoint's
    weights do not match its config.json.
    """
    source = resolve_model(name)
    checkpoint = read_config(name, source, trust_remote_code, task)
    with loading(name, source, WEIGHTS):
        gathered = (Path(source) / GATHERED).exists()
        return checkpoint.without_weights()[0] if gathered else checkpoint.skeleton()


def read_shapes(
    name: str, *, task: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """Load a model without its weights, on the meta device, and the dtype of the weights, from its config alone.

    The arguments are those of `read_model`. Raises `PermpruneError` if the config is not usable.
    """
    source = resolve_model(name)
    checkpoint = read_config(name, source, trust_remote_code, task)
    with loading(name, source, CONFIG):
        require_buildable(checkpoint.config)
        return checkpoint.without_weights()


def read_size(name: str, model: PreTrainedModel, *, trust_remote_code: bool = False) -> tuple[int, int] | None:
    """Return the height and width of the images that a model reads, from its processor; None if it reads others.

    `name` and `trust_remote_code` are those of `read_model`. Raises `PermpruneError` if the processor does not load.
    """
    if kind_of(model) != "images":
        return None
    source = resolve_model(name)
    with loading(name, source, PROCESSOR):
        return processed_size(read_processor(source, trust_remote_code))


def read_offloaded(
    name: str, folder: Path, *, task: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Processor | None, torch.dtype, StoredWeights]:
    """Like `read_model`, but the model's parameters are on the meta device, and its weights are returned separately.

    The model can run after `attach(model, weights)`. Weights that Transformers converts when loading, such as fused
    experts, are written to `folder` in the converted form. The other arguments are those of `read_model`. Raises
    `PermpruneError` if the model does not load or has no safetensors files.
    """
    checkpoint, processor = open_checkpoint(name, trust_remote_code, task)
    source = Path(checkpoint.source)
    model, stored = _offloaded(checkpoint, folder)
    record = read_record(source) if (source / RECORD).exists() else None
    if record is not None:
        require_digests(source, record.digests)
    dtype = model.dtype
    set_origin(model, Origin(name, dtype, record))
    _convert(model, torch.float32)
    return model.eval(), processor, dtype, StoredWeights(stored, canonical_names(model))


def _offloaded(checkpoint: ModelFiles, folder: Path) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """Load a model without its weights, as `ModelFiles.load` does, and its weights; `folder` gets the fused ones."""
    with loading(checkpoint.name, checkpoint.source, WEIGHTS):
        model = checkpoint.load(device_map={"": "disk"}, offload_folder=str(folder), use_safetensors=True)
        hooks: list[Any] = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
        stored = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    if rebuilt := sorted({*(getattr(model, "_keys_to_ignore_on_save", None) or ())} - {*stored}):
        raise PermpruneError(
            f"{checkpoint.name} can only be pruned whole in memory, since its checkpoint does not store {rebuilt[0]}: "
            "raise --memory, or leave offload out"
        )
    remove_hook_from_submodules(model)
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # which accelerate leaves behind: a layer with one of its own would not count as plain
        for buffer, tensor in module.named_buffers(recurse=False):
            setattr(module, buffer, tensor.to(best_device()))
    return model, stored


def _gathered(checkpoint: ModelFiles, path: Path) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The same for a file of weights that need gathers."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = checkpoint.architecture._from_config(checkpoint.config)
    with loading(checkpoint.name, path.parent, WEIGHTS), safe_open(path, "pt") as file:
        stored = {name: {"safetensors_file": str(path), "weight_name": name} for name in file.keys()}  # noqa: SIM118
        for prefix, module in model.named_modules():
            for buffer, tensor in module.named_buffers(recurse=False):
                name = f"{prefix}.{buffer}".lstrip(".")
                setattr(module, buffer, (file.get_tensor(name) if name in stored else tensor).to(best_device()))
    return model, OffloadedWeightsLoader(index=stored)


def load_written_offloaded(model: PreTrainedModel, folder: Path, scratch: Path) -> PreTrainedModel:
    """Like `load_written`, with weights that are read when the model runs; `scratch` is as in `read_offloaded`."""
    record, checkpoint = read_record(folder), written_checkpoint(model, folder)
    if record.gathers:
        loaded, stored = _gathered(checkpoint, folder / GATHERED)
    else:
        loaded, stored = _offloaded(checkpoint, scratch)
    _convert(loaded, torch.float32)
    attach(loaded, StoredWeights(stored, canonical_names(loaded)))
    attach_gathers(loaded, record.gathers)
    loaded.eval()
    return loaded


def attach(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Register hooks on the model's modules so that each loads its parameters from `weights` whenever it runs."""
    attach_align_device_hook(model, execution_device=best_device(), offload=True, weights_map=weights)


def load_at_rest(model: PreTrainedModel, weights: StoredWeights, pruned: Collection[str], *, held: bool) -> None:
    """Give a model on the meta device its weights, of which those of the layers in its blocks are at rest.

    These are read from the checkpoint whenever they are used or, if they are `held`, from the memory of the host. The
    `pruned` parameters and those of the model's ends have the type in which a search holds them, all others fp32.
    """
    ends = {id(weight) for weight, _ in end_weights(model)}
    device = best_device()
    users = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    resting = {layer.parameter for layer in block_linears(model) if users[layer.stored] == 1}
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in [*module.named_parameters(recurse=False)]:
            name = f"{prefix}.{attribute}".removeprefix(".")
            if name in resting:
                dtype = held_type(weights.stored[name].dtype) if name in pruned else torch.float32
                module._parameters[attribute] = _at_rest(weights.stored, name, dtype, device, held=held)
                replaced_while_running(module, attribute, values_of)
                continue
            if parameter not in loaded:
                narrow = id(parameter) in ends and is_narrow(weights.stored[name].dtype)
                tensor = weights.stored[name].to(device, copy=True) if narrow else weights[name]
                loaded[parameter] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[attribute] = loaded[parameter]


def _at_rest(
    stored: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device, *, held: bool
) -> nn.Parameter:
    tensor = stored[name]
    if not held:
        return at_rest(lambda: stored[name], tensor.shape, dtype, device)
    kept = empty_on_host(tensor.to("meta", held_type(tensor.dtype)), device).copy_(tensor)
    return at_rest(lambda: kept, kept.shape, dtype, device)


def write_offloaded(
    model: PreTrainedModel,
    processor: Processor | None,
    weights: StoredWeights,
    *,
    dtype: torch.dtype,
    gathered: bool,
    folder: Path,
    memory: int,
) -> None:
    """Like `write_weights`, for a model whose weights are on disk.

    `gathered` is whether the weights need gathers. At most half of `memory` bytes of weights are held in memory at a
    time, or a single tensor if it is larger.
    """
    _convert(model, dtype)
    if gathered:
        write_configs(model, folder)
        _save_in_turn(model, weights, folder / GATHERED)
        stop_transformers(folder, GATHERED)
    else:
        edit = weights.edit
        weights.edit = lambda name, tensor: (tensor if edit is None else edit(name, tensor)).to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # of tied weights, compared
            model.save_pretrained(folder, max_shard_size=min(memory // 2, SHARD))
    write_beside(model, processor, folder)


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters to a dtype and tie weights again, which conversion or offloading may have untied."""
    model.to(dtype)  # type: ignore[arg-type]
    model.tie_weights()


def _save_in_turn(model: PreTrainedModel, weights: StoredWeights, path: Path) -> None:
    """Write all tensors of the model, in the model's dtypes, to one safetensors file, holding one of them at a time."""
    tensors = {name: t for name, t in model.state_dict().items() if weights.canonical.get(name, name) == name}
    read = Computed(
        tensors, lambda name: weights[name].to(tensors[name].dtype) if tensors[name].is_meta else tensors[name]
    )
    write_tensors(path, read, {"format": "pt"}, described=tensors)
