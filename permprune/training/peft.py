"""Adapters of PEFT on pruned models: LoRA on packed layers, and a merge that keeps zeros."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.patterns import linear_layers
from permprune.errors import PermpruneError
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import is_packed
from permprune.pattern import tightest
from permprune.system.progress import log

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

BASE = ".base_layer"
"""What PEFT appends to the name of a layer that has an adapter."""


@torch.no_grad()
def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapters of a PEFT model into its weights, and keep pruned weights at zero.

    What an adapter adds to a pruned weight is dropped; the log says how much that is. Returns the model that PEFT was
    given, so that `permprune.save` writes it with its record. Raises `PermpruneError` if no layer that has an adapter
    has an N:M pattern, and if the weights are packed.
    """
    base: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
    if is_packed(base):
        raise PermpruneError("packed weights are frozen: save the adapter, and load it beside the packed model")
    record = origin_of(base).record
    recorded = {layer.name for layer in record.layers} if record else set()
    adapted = {name.replace(BASE, ""): layer for name, layer in linear_layers(base).items() if BASE in name}
    masks = {name: layer.weight == 0 for name, layer in adapted.items() if name in recorded or tightest(layer.weight)}
    if not masks:
        raise PermpruneError(
            f"none of the {len(adapted)} layers with adapters has an N:M pattern: merge them with merge_and_unload"
        )
    merged: PreTrainedModel = model.merge_and_unload()
    layers, dropped, total = linear_layers(merged), 0.0, 0.0
    for name, mask in masks.items():
        weight = layers[name].weight
        total += float(weight.float().square().sum())
        dropped += float(weight[mask].float().square().sum())
        weight.masked_fill_(mask, 0.0)
    log.info(
        "merged the adapters of %d pruned layers; what they added to pruned weights, %.2g %% of the layers' norm, is"
        " dropped",
        *(len(masks), 100 * (dropped / max(total, 1e-30)) ** 0.5),
    )
    return merged


def lora_on_packed(config: LoraConfig) -> LoraConfig:
    """Let a `LoraConfig` put adapters on packed layers; returns it. Give it to `get_peft_model` or `from_pretrained`.

    The packed weights stay as they are, and such adapters cannot be merged. Raises `PermpruneError` without PEFT.
    """
    config._register_custom_module({PackedLinear: _lora_class()})
    return config


def _lora_class() -> type[Any]:
    """Return the class of a packed layer with LoRA, which is not made before PEFT is needed."""
    try:
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise PermpruneError("adapters on packed layers need PEFT: pip install 'permprune[peft]'") from error

    class PackedLora(Linear):  # type: ignore[misc]
        """LoRA beside a packed layer."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT's, of the class of the packed layer
                super().__init__(*arguments, **keywords)

        def merge(self, *_: Any, **__: Any) -> None:
            raise PermpruneError("packed weights are frozen: save the adapter, and load it beside the packed model")

    return PackedLora
