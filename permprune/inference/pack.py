"""Packing and unpacking the linear layers of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permprune.checkpoints.gathers import detach_gathers
from permprune.checkpoints.patterns import linear_layers
from permprune.errors import PermpruneError
from permprune.inference.quantizer import PackedConfig, PackedQuantizer, reorder_output, replace_head
from permprune.kernels.module import PackedLinear
from permprune.pattern import Pattern

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
"""The types of packed values, by their names for `pack`."""


def packed_type(name: str) -> torch.dtype:
    """Return the type of packed values with this name. Raises `PermpruneError` if there is none."""
    if name not in NAMES:
        raise PermpruneError(f'weights cannot be packed as "{name}": choose {", ".join(NAMES)}')
    return NAMES[name]


def pack(
    model: PreTrainedModel,
    patterns: Mapping[str, Pattern | str],
    *,
    dtype: str = "bf16",
    head: str | None = None,
) -> list[str]:
    """Replace linear layers of a pruned model by `PackedLinear`, in place.

    `patterns` maps the names of the layers to their N:M patterns. `dtype` is "fp32", "bf16", "fp16" or "int8" (with a
    scale for every 64 channels of a row); the rest of the model is converted to it too, unless it is
    int8. With `head="int8"` the embedding and the head become int8 as well, whatever the `dtype`. The orders of a model
    in gather mode become part of the packed model. Afterwards `model.save_pretrained` writes a folder that
    `from_pretrained` loads once permprune is imported.

    Returns the names of layers that stay dense: experts, and layers whose class is neither `nn.Linear` nor `Conv1D`, as
    subclasses may compute something else. Raises `PermpruneError` if a weight does not hold its pattern or does not fit
    the dtype.
    """
    stored, dense, gathers = packed_type(dtype), [], detach_gathers(model)
    orders = {name: order for (side, name), order in gathers.items() if side == "input"}
    layers: dict[str, str] = {}
    linears = linear_layers(model)
    for name, text in patterns.items():
        layer = linears[name].owner
        if type(layer) not in (nn.Linear, Conv1D):
            if linears[name].owner_name in orders:
                raise PermpruneError(
                    f"{name} has a channel order, but a {type(layer).__name__} cannot be packed: prune in fold mode"
                )
            dense.append(name)
            continue
        pattern = Pattern.parse(text)
        try:
            packed = PackedLinear.pack(layer, pattern, stored, orders.get(name))
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error
        model.set_submodule(name, packed)
        layers[name] = str(pattern)
    if not layers:
        raise PermpruneError("no layer to pack: give a model that was pruned to N:M")
    if stored != torch.int8:
        _convert(model, stored)
    reordered = {name: order for (side, name), order in gathers.items() if side == "output"}
    for name, order in reordered.items():
        reorder_output(model.get_submodule(name), order)
    config = PackedConfig(
        layers=layers,
        dtype=str(stored).removeprefix("torch."),
        ordered=[name for name in layers if name in orders],
        reordered={name: len(order) for name, order in reordered.items()},
        head=_head_names(model, head),
    )
    replace_head(model, config.head, model.dtype)
    if "tied" in config.head:
        model.config.tie_word_embeddings = False  # the head has no weight that Transformers could tie
    PackedQuantizer(config).adopt(model)
    return dense


def _head_names(model: PreTrainedModel, head: str | None) -> dict[str, str]:
    """The names of the embedding and the head, as `PackedConfig` has them; none unless they are to be int8."""
    if head is None:
        return {}
    if head != "int8":
        raise PermpruneError(f'the head cannot be "{head}": give int8, or leave it as it is')
    names = {module: name for name, module in model.named_modules()}
    embedding, linear = model.get_input_embeddings(), model.get_output_embeddings()
    found = {"embedding": names[embedding]}
    if linear is not None:
        found["tied" if linear.weight is embedding.weight else "linear"] = names[linear]
    return found


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert floating-point tensors to `dtype`, except for buffers that are not saved, as loading in `dtype` would."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def unpack(model: PreTrainedModel) -> None:
    """Replace every `PackedLinear` by its dense layer, with zeros for the pruned weights, in place.

    The columns of each weight are put into the order of the channels that the layer reads. Raises `PermpruneError` for
    a model that is not packed.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), PackedQuantizer):
        raise PermpruneError("the model is not packed: give one that pack or from_pretrained made")
    model.dequantize()
