"""Packing and unpacking the linear layers of a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from permprune.checkpoints.gathers import BUFFERS, Gather, attached_orders, detach_gathers
from permprune.checkpoints.origin import linear_layers
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.inference.quantizer import (
    PackedConfig,
    PackedQuantizer,
    reorder_output,
    replace_by_tables,
    replace_head,
    require_head,
    tie_head,
)
from permprune.inference.solving import solve
from permprune.kernels.product.int8 import Int8Table
from permprune.kernels.product.layout import BLOCK, LARGEST_GROUP, Layout
from permprune.kernels.product.module import PackedLinear
from permprune.kernels.product.packed import PackedWeight
from permprune.models.forward import kept_in_fp32
from permprune.models.layers import Layer, require_changeable
from permprune.options import PACKED
from permprune.pattern import DENSE, Pattern
from permprune.system.device import INT4, dtype_named


def packed_type(name: str) -> torch.dtype:
    """Return the type of packed values with this name. Raises `PermpruneError` if there is none."""
    if (dtype := dtype_named(name)) is None:
        raise PermpruneError(f'weights cannot be packed as "{name}": choose {", ".join(PACKED)}')
    return dtype


def pack(
    model: PreTrainedModel,
    patterns: Mapping[str, Pattern | str],
    *,
    dtype: str = "bf16",
    head: str | None = None,
    examples: Examples | None = None,
) -> list[str]:
    """Replace linear layers of a pruned model by `PackedLinear`, in place.

    `patterns` maps the names of the layers to their N:M patterns, or to "dense" for those that a mix left so. `dtype`
    is "fp32", "bf16", "fp16", "int8" or "int4" (with a scale for every 64, or 16, channels of a row); the rest of the
    model is converted to it too, unless it is an integer: then the dense layers of a mix become int8. With
    `head="int8"` the embedding and the head become int8 as well, whatever the `dtype`. The orders of a model in gather
    mode become part of the packed model. Afterwards `model.save_pretrained` writes a folder that `from_pretrained`
    loads once permprune is imported.

    Values of int4 are rounded, or solved on calibration `examples` (`solving.solve`): give them where outputs count.

    Returns the names of layers that have no such form and stay as they are: experts, layers that `PackedLinear` does
    not replace, because their class computes something else than `nn.Linear` or `Conv1D`, and dense layers that should
    be int8 but whose width 64 does not divide. Raises `PermpruneError` if a weight does not hold its pattern or does
    not fit the dtype, or the head cannot be int8; the model is unchanged then.
    """
    require_changeable(model)
    stored, orders = packed_type(dtype), attached_orders(model)
    if examples is not None and stored != INT4:
        raise PermpruneError(f"values in {dtype} are rounded, not solved: leave out the calibration, or pack as int4")
    layers, tables, left = _packable(model, patterns, stored, {name for side, name in orders if side == "input"})
    named = head_names(model, head)
    scales = {}
    if examples is not None:
        linears = linear_layers(model)
        scales = solve(model, {name: linears[name] for name in layers}, layers, examples)
    detach_gathers(model)
    for name, pattern in layers.items():
        order = orders.get(("input", name))
        packed = PackedLinear.pack(model.get_submodule(name), pattern, stored, order, scales.get(name))
        model.set_submodule(name, packed)
    replace_by_tables(model, tables)
    if stored.is_floating_point:
        _convert(model, stored)
    reordered = {name: order for (side, name), order in orders.items() if side == "output"}
    for name, order in reordered.items():
        reorder_output(model.get_submodule(name), order)
    config = PackedConfig(
        layers={name: str(pattern) for name, pattern in layers.items()},
        dtype=str(stored).removeprefix("torch."),
        ordered=[name for name in layers if ("input", name) in orders],
        reordered={name: len(order) for name, order in reordered.items()},
        head=named,
        tables=tables,
    )
    replace_head(model, config.head, model.dtype)
    if "tied" in config.head:
        tie_head(model, False)  # the head has no weight that Transformers could tie
    PackedQuantizer(config).adopt(model)
    return left


def _packable(
    model: PreTrainedModel, patterns: Mapping[str, Pattern | str], dtype: torch.dtype, ordered: set[str]
) -> tuple[dict[str, Pattern], list[str], list[str]]:
    """Return the patterns of the layers that can be packed, the names of dense ones to be int8, and of those that stay.

    `ordered` are the names of modules with a channel order. Raises `PermpruneError` as `pack`.
    """
    linears = linear_layers(model)
    layers: dict[str, Pattern] = {}
    tables: list[str] = []
    left: list[str] = []
    paths: dict[nn.Parameter, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(parameter, set()).add(path)
    for name, text in patterns.items():
        if name not in linears:
            raise PermpruneError(f"the model has no linear layer {name}: give the patterns of its own layers")
        layer, pattern = linears[name], None if text == DENSE else Pattern.parse(text)
        if pattern is None and dtype.is_floating_point:
            continue
        if not (_can_be_table(layer) if pattern is None else has_packed_form(layer)):
            left.append(name)
            continue
        if others := paths[model.get_parameter(layer.parameter)] - {layer.parameter}:
            raise PermpruneError(f"{name} shares its weight with {min(others)}, which cannot be packed: leave it out")
        try:
            if pattern is None:
                Int8Table.require(layer.weight)
                tables.append(name)
            else:
                PackedWeight.layout_of(layer.weight, pattern, dtype)
                layers[name] = pattern
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error
    if not layers:
        kind = f"; a {type(linears[left[0]].owner).__name__} has no packed form" if left else ""
        raise PermpruneError(f"no layer to pack: give a model whose linear layers were pruned to N:M{kind}")
    for name in ordered - layers.keys():
        raise PermpruneError(
            f"{name} has a channel order but cannot be packed: give its pattern, or prune in fold mode"
        )
    return layers, tables, left


def has_packed_form(layer: Layer) -> bool:
    """Whether a layer can become a `PackedLinear`, with a pattern and values that this has."""
    return layer.expert is None and PackedLinear.replaces(layer.owner)


def _can_be_table(layer: Layer) -> bool:
    return layer.weight.shape[1] % BLOCK == 0 and has_packed_form(layer)


def packed_bytes(model: nn.Module, patterns: Mapping[str, Pattern | str], gathers: Iterable[Gather] = ()) -> int | None:
    """Return the bytes of the tensors of a model that `pack` would make in bf16, from the shapes of `model` alone.

    `patterns` are the N:M patterns of layers; `gathers` are those of the pruned model, which need not be attached.
    Returns None if no layer can be packed.
    """
    linears = linear_layers(model)
    layers = [(linears[name], Pattern.parse(text)) for name, text in patterns.items()]
    packable = [pattern for layer, pattern in layers if has_packed_form(layer)]
    if not packable or any(pattern.m > LARGEST_GROUP for pattern in packable):
        return None
    of_layers = sum(layer_bytes(model, layer, pattern) for layer, pattern in layers)
    return of_layers + other_bytes(model, [layer for layer, _ in layers], gathers)


def layer_bytes(model: nn.Module, layer: Layer, pattern: Pattern | None, *, dtype: str = "bf16") -> int:
    """Return the bytes of a layer's weight in a model that is packed as `dtype`; dense in a mix without a pattern.

    Layers that have no packed form are dense with any pattern.
    """
    stored, (rows, width) = packed_type(dtype), layer.weight.shape
    if pattern is not None and has_packed_form(layer):
        return rows * Layout(pattern, stored, width).row_bytes
    if pattern is None and not stored.is_floating_point and _can_be_table(layer):
        return _table_bytes(rows * width)
    return rows * width * _item(model, stored, layer.parameter)


def other_bytes(
    model: nn.Module,
    layers: Iterable[Layer],
    gathers: Iterable[Gather] = (),
    *,
    dtype: str = "bf16",
    head: str | None = None,
) -> int:
    """Return the bytes of a model's tensors, packed as `dtype` and `head`, but for the weights of some layers."""
    item = partial(_item, model, packed_type(dtype))
    total = sum(parameter.numel() * item(name) for name, parameter in model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and name not in BUFFERS.values():
                size = item(f"{path}.{name}") if buffer.is_floating_point() else buffer.dtype.itemsize
                total += buffer.numel() * size
    named = head_names(model, head)  # type: ignore[arg-type]
    for name in (f"{module}.weight" for part, module in named.items() if part != "tied"):
        table = model.get_parameter(name)
        total -= table.numel() * item(name) - _table_bytes(table.numel())
    total -= sum(layer.weight.numel() * item(layer.parameter) for layer in layers)
    return total + sum(len(gather.places) * len(gather.order) * torch.int64.itemsize for gather in gathers)


def _table_bytes(weights: int) -> int:
    return weights + weights // BLOCK * torch.float32.itemsize


def _item(model: nn.Module, stored: torch.dtype, name: str) -> int:
    """The bytes of an element of a tensor of this name that is not packed, where packed ones are `stored`."""
    kept: torch.dtype = stored if stored.is_floating_point else model.dtype  # type: ignore[assignment]
    return (torch.float32 if kept_in_fp32(model, kept).search(name) else kept).itemsize


def head_names(model: PreTrainedModel, head: str | None) -> dict[str, str]:
    """Return the names of the embedding and the head, as `PackedConfig` has them; none unless they are to be int8.

    Raises `PermpruneError` if they cannot be. The model may be on the meta device.
    """
    if head is None:
        return {}
    if head != "int8":
        raise PermpruneError(f'the head cannot be "{head}": give int8, or leave it as it is')
    names = {module: name for name, module in model.named_modules()}
    embedding, linear = _token_table(model), model.get_output_embeddings()
    parts = {"embedding": names[embedding]}
    if linear is not None:
        parts["tied" if linear.weight is embedding.weight else "linear"] = names[linear]
    require_head(model, parts)
    return parts


def _token_table(model: PreTrainedModel) -> nn.Embedding:
    """The embedding of a model's tokens. Raises `PermpruneError` if it has none, or several that share their weight."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # raised by models of sound
        table = None
    what = f"the {type(model).__name__}"
    if not isinstance(table, nn.Embedding):
        raise PermpruneError(f"{what} reads no tokens, so that no embedding could be int8: leave out --head")
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if sum(module.weight is table.weight for module in tables) > 1:
        raise PermpruneError(
            f"encoder and decoder of {what} share an embedding, which cannot be int8: leave out --head"
        )
    return table


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert floating-point tensors to `dtype`, as loading in `dtype` would.

    Buffers that are not saved keep their type, and so do modules that Transformers keeps in fp32.
    """
    wide = kept_in_fp32(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not wide.search(f"{path}.{name}"):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set and not wide.search(f"{path}.{name}")
            if buffer.is_floating_point() and saved:
                module._buffers[name] = buffer.to(dtype)


def unpack(model: PreTrainedModel) -> None:
    """Replace every `PackedLinear` by its dense layer, with zeros for the pruned weights, in place.

    Orders of channels become gathers again, with which `permprune.save` writes the model. Raises `PermpruneError` for a
    model that is not packed.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), PackedQuantizer):
        raise PermpruneError("the model is not packed: give one that pack or from_pretrained made")
    model.dequantize()
