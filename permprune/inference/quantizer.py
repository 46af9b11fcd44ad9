"""Packed checkpoints for Transformers, through its interface for quantizers: `quant_method: permprune` in config.json.

Transformers imports this module (`after_import`) when any other of the package first needs its models. So modules that
need them too are imported where they are used.

With permprune imported, `from_pretrained` creates the model without weights, replaces the layers that the config lists
by `PackedLinear`, and loads the packed tensors like any others; `save_pretrained` writes them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from permprune.checkpoints.weights import PACKED_WEIGHTS, stop_transformers
from permprune.errors import PermpruneError
from permprune.kernels.elementwise.module import restore_layers, use_native_layers
from permprune.kernels.product.int8 import Int8Embedding, Int8Linear, Int8Table, TiedHead
from permprune.kernels.product.layout import DTYPES
from permprune.kernels.product.module import PackedLinear
from permprune.kernels.product.plain import use_kernels, use_pytorch
from permprune.pattern import Pattern
from permprune.system.memory import keep_activations, move_to_huge_pages

if TYPE_CHECKING:
    from permprune.checkpoints.gathers import Gather

METHOD = "permprune"

FORMAT, FORMATS = 1, {"int4": 2}
"""The number of the format of packed checkpoints, and those of types whose values were once stored otherwise."""

TABLES: dict[str, tuple[type[nn.Module], type[Int8Table]]] = {
    "embedding": (nn.Embedding, Int8Embedding),
    "linear": (nn.Linear, Int8Linear),
}
"""The dense and the int8 class of the parts of `PackedConfig.head` that have a table."""

ORDER = "channel_order"
"""The name of the buffer with the order, in a module whose output is reordered."""


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The configuration of a packed checkpoint.

    `layers` maps the names of packed modules to N:M patterns, and `dtype` is the type of their stored values. `ordered`
    lists the layers with a channel order. `reordered` maps the names of modules whose output is reordered, for all
    modules that read it, to its width. `head` names the embedding and the head that are int8, as "embedding" and
    "linear"; a "tied" head is the embedding's table. `tables` lists the layers that keep all weights, in int8.
    `weights` is the name of the file of weights, or of its index; None for that of Transformers. Raises
    `PermpruneError` for a configuration that no version so far has written.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        dtype: str,
        ordered: Sequence[str] = (),
        reordered: Mapping[str, int] | None = None,
        head: Mapping[str, str] | None = None,
        tables: Sequence[str] = (),
        weights: str | None = None,
        version: int | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        current = FORMATS.get(dtype, FORMAT)
        self.version, self.layers, self.dtype = current if version is None else version, dict(layers), dtype
        self.ordered, self.reordered, self.head = list(ordered), dict(reordered or {}), dict(head or {})
        self.tables, self.weights = list(tables), weights
        if self.version != current:
            earlier = "pack the folder that it was made from again"
            cure = earlier if self.version < current else "install a permprune that reads it"
            raise PermpruneError(f"the packed checkpoint has format {self.version}, not {current}: {cure}")
        known = set(self.ordered) <= set(self.layers) and set(self.head) <= {"embedding", "linear", "tied"}
        if self.stored not in DTYPES or not known:
            raise PermpruneError("the packed checkpoint's quantization_config is damaged: pack the model again")

    @property
    def stored(self) -> torch.dtype | None:
        """The type of the stored values; None if torch has no type of this name."""
        return getattr(torch, self.dtype, None)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model before its weights are loaded, and checks them afterwards."""

    requires_calibration = True
    is_trainable = True  # by adapters: packed weights are frozen
    is_compileable = True
    quantization_config: PackedConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Name the file of the weights, in place of the cure for those who have not imported permprune."""
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        for name, text in config.layers.items():
            path, layer = _find_linear(model, name)
            packed = PackedLinear.pack(layer, Pattern.parse(text), config.stored)  # type: ignore[arg-type]
            packed.order = _empty_order(packed.in_features) if name in config.ordered else None
            model.set_submodule(path, packed)
        for name, width in config.reordered.items():
            reorder_output(_find(model, name)[1], _empty_order(width))
        replace_by_tables(model, config.tables)
        headless = model.get_output_embeddings() is None  # such as what AutoModel makes of a language model
        head = {part: name for part, name in config.head.items() if part == "embedding" or not headless}
        replace_head(model, head, model.dtype)
        scales = {f"{name}.scale" for name, module in model.named_modules() if isinstance(module, Int8Table)}
        wide = model._keep_in_fp32_modules_strict or ()  # where Transformers loads scales of int8 tables as they are
        model._keep_in_fp32_modules_strict = {*wide, *scales}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | Int8Table):
                module.check(name)
        use_kernels(model)
        use_native_layers(model)
        move_to_huge_pages(model)
        if model.device.type == "cpu":
            from permprune.models.sdpa import use_native_attention

            keep_activations()
            use_native_attention(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module)["save_pretrained"] = partial(_save_packed, module)
        return model

    def adopt(self, model: PreTrainedModel) -> None:
        """Mark a model with packed layers as loaded by this quantizer."""
        model.hf_quantizer = self  # type: ignore[assignment]
        model.quantization_method = METHOD  # type: ignore[assignment]
        model.is_quantized = True  # type: ignore[assignment]
        self.postprocess_model(model)  # checks the layers and prepares the model to run

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from permprune.checkpoints.gathers import attach_gathers
        from permprune.checkpoints.origin import origin_of, set_origin
        from permprune.evaluation.size import weight_bytes

        for module in model.modules():
            vars(module).pop("save_pretrained", None)
        gathers = _restored_gathers(model)
        _unpack_layers(model, model.dtype)
        attach_gathers(model, gathers)
        origin = origin_of(model)
        if origin.record is not None:
            record = origin.record.unpacked(weight_bytes(model))
            set_origin(model, dataclasses.replace(origin, record=record))
        return model


def _save_packed(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    """Write a packed model as `PreTrainedModel.save_pretrained` does, under a name that plain Transformers refuses."""
    if options.get("push_to_hub"):
        raise PermpruneError("save_pretrained does not upload packed weights: write them, then push the folder")
    folder, config = Path(folder), model.config.quantization_config
    config.weights = None
    type(model).save_pretrained(model, folder, **options)
    for suffix in ("", ".index.json"):
        if (path := folder / f"{SAFE_WEIGHTS_NAME}{suffix}").exists():
            config.weights = f"{PACKED_WEIGHTS}{suffix}"
            path.rename(folder / config.weights)
    model.config.save_pretrained(folder)
    stop_transformers(folder, PACKED_WEIGHTS)


def _restored_gathers(model: nn.Module) -> list[Gather]:
    """Return the gathers that became part of a model when it was packed, and undo those of outputs."""
    from permprune.checkpoints.gathers import Gather

    gathers = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.order is not None:
            gathers.append(Gather(name, "", [name], module.order.tolist()))
        elif (order := module._buffers.pop(ORDER, None)) is not None:
            gathers.append(Gather(name, name, [], order.tolist()))
            for key in [key for key, hook in module._forward_hooks.items() if hook is _reorder]:
                del module._forward_hooks[key]
    return gathers


def _unpack_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every `PackedLinear`, and an int8 embedding and head, by their `dense` layers, in place."""
    from permprune.models.sdpa import restore_attention

    use_pytorch(model)
    restore_layers(model)
    restore_attention(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear | Int8Embedding | Int8Linear):
            model.set_submodule(name, module.dense(dtype))
        elif isinstance(module, TiedHead):
            table = module.embedding
            with torch.device("meta"):
                tied = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
            model.set_submodule(name, tied)
            tied.weight = model.get_input_embeddings().weight  # type: ignore[assignment]
            tie_head(model, True)


def tie_head(model: PreTrainedModel, tied: bool) -> None:
    """Say in the configuration whether Transformers ties the head's weight to the embedding's.

    A model with a text model says so in both configurations, as some take the text model's when they are read.
    """
    model.config.tie_word_embeddings = tied
    model.config.get_text_config(decoder=True).tie_word_embeddings = tied


def require_head(model: PreTrainedModel, head: Mapping[str, str]) -> None:
    """Raise `PermpruneError` unless the embedding and the head that a `PackedConfig` names can be int8.

    They have to be an `nn.Embedding` and an `nn.Linear`, not of a subclass, that `Int8Table.require` accepts.
    """
    for part, (dense, int8) in TABLES.items():
        if part not in head:
            continue
        _, layer = _find(model, head[part])
        if type(layer) is not dense:
            raise PermpruneError(
                f"{head[part]} is a {type(layer).__name__}, which cannot be int8: leave the head as it is"
            )
        int8.require(layer.weight)  # type: ignore[arg-type]


def replace_head(model: PreTrainedModel, head: Mapping[str, str], dtype: torch.dtype) -> None:
    """Replace the embedding and the head that a `PackedConfig` names by int8 ones, to be filled if on the meta device.

    The embedding's vectors have type `dtype`. Raises `PermpruneError` as `require_head`.
    """
    require_head(model, head)
    if "embedding" in head:
        path, table = _find(model, head["embedding"])
        model.set_submodule(path, Int8Embedding.pack(table.weight.data, dtype=dtype))  # type: ignore[union-attr,arg-type]
    if "linear" in head:
        replace_by_tables(model, [head["linear"]])
    if "tied" in head:
        _, table = _find(model, head["embedding"])
        model.set_submodule(_find(model, head["tied"])[0], TiedHead(table))  # type: ignore[arg-type]


def replace_by_tables(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Replace linear layers by int8 ones, to be filled if they are on the meta device.

    Raises `PermpruneError` unless they are linear, and as `Int8Table.require`.
    """
    for name in names:
        path, layer = _find_linear(model, name)
        transposed, bias = isinstance(layer, Conv1D), layer.bias
        weight = layer.weight.data.T if transposed else layer.weight.data
        table = Int8Linear.pack(weight, bias=None if bias is None else bias.data, transposed=transposed)
        model.set_submodule(path, table)


def reorder_output(module: nn.Module, order: Tensor) -> None:
    """Reorder a module's output: channel c becomes what was channel `order[c]`. The order is saved with the weights."""
    module.register_buffer(ORDER, order)
    module.register_forward_hook(_reorder)


def _reorder(module: nn.Module, _args: object, result: Tensor) -> Tensor:
    order: Tensor = module._buffers[ORDER]  # type: ignore[assignment]
    return result.index_select(-1, order)


def _empty_order(width: int) -> Tensor:
    return torch.empty(width, dtype=torch.int64, device="meta")


def _find_linear(model: PreTrainedModel, name: str) -> tuple[str, nn.Linear | Conv1D]:
    path, layer = _find(model, name)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise PermpruneError(f"{name} is packed in the checkpoint but a {type(layer).__name__} in the model")
    return path, layer


def _find(model: PreTrainedModel, name: str) -> tuple[str, nn.Module]:
    """Return the name and the module in the model of a name in a checkpoint, saved with or without a head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    raise PermpruneError(f"the checkpoint has a packed {name}, which {type(model).__name__} does not have")
