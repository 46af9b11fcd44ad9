"""Pruned weights stay zero, whoever trains the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel, TrainerCallback

from permprune.checkpoints.origin import (
    Patterns,
    held_patterns,
    linear_layers,
    origin_of,
    recorded_patterns,
    require_patterns,
)
from permprune.errors import PermpruneError
from permprune.kernels.product.int8 import Int8Linear
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import is_packed
from permprune.pattern import tightest
from permprune.system.progress import log

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

BASE = ".base_layer"
"""What PEFT appends to the name of a layer that has an adapter."""


class KeptZeros:
    """Keeps the weights of layers that are zero now at zero, until `close` or the end of the context.

    Their gradients are set to zero, unless they are frozen at first, so that they count in no norm and no moment, and
    after each step of a `torch.optim.Optimizer` they are set to zero themselves, because momentum or noise moves
    weights without a gradient.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        linears, masks = linear_layers(model), dict[str, Tensor]()
        for layer in map(linears.__getitem__, layers):
            mask = masks.setdefault(layer.parameter, torch.zeros_like(layer.stored, dtype=torch.bool))
            layer.part_of(mask).copy_(layer.weight == 0)
        self._model, self._masks = model, masks
        # weak, because the hook of steps is global: without `close`, it stays
        by_parameter = WeakTensorKeyDictionary({model.get_parameter(name): mask for name, mask in masks.items()})

        def keep(mask: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda gradient: gradient.masked_fill(mask.to(gradient.device), 0.0)

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            with torch.no_grad():
                for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                    if (mask := by_parameter.get(parameter)) is not None:
                        parameter.masked_fill_(mask.to(parameter.device), 0.0)

        self._handles = [
            parameter.register_hook(keep(mask)) for parameter, mask in by_parameter.items() if parameter.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(after_step))

    def close(self) -> None:
        """Stop. Raises `PermpruneError` if a weight is not zero any more, because something replaced the parameters."""
        self._remove()
        for name, mask in self._masks.items():
            if self._model.get_parameter(name).detach()[mask].any():
                raise PermpruneError(
                    f"pruned weights of {name} are not zero any more: train it without FSDP and DeepSpeed, which"
                    " replace the parameters of the model"
                )

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._remove()


def keep_pattern(model: PreTrainedModel) -> KeptZeros:
    """Keep pruned weights at zero while other code trains the model, with any optimizer of `torch.optim`'s base class.

    The layers are those that the model's record lists and those whose weights satisfy an N:M pattern now. Call it
    before the first step; the result is a context manager, or ends with `close`. Weights of packed layers are frozen
    anyway. Raises `PermpruneError` if no layer has a pattern, if one does not hold that of the record any more, and if
    the model has adapters of PEFT.
    """
    if any(name.rpartition(".")[2] == "base_layer" for name, _ in model.named_modules()):
        raise PermpruneError(
            "the model has adapters of PEFT, which leave its weights as they are: train them, then give the model to"
            " permprune.merge_adapters"
        )
    patterns = patterns_of(model)
    if not patterns:
        count = len(linear_layers(model))
        raise PermpruneError(f"none of the {count} linear layers of this model has an N:M pattern: prune it first")
    return KeptZeros(model, [] if is_packed(model) else patterns)


def patterns_of(model: PreTrainedModel) -> Patterns:
    """Return the N:M patterns that the layers have to keep: those in the record and those that the weights satisfy.

    Raises `PermpruneError` if the weights of a layer do not satisfy the pattern in the record.
    """
    record, held = origin_of(model).record, held_patterns(model)
    recorded = recorded_patterns(model, record.layers) if record else {}
    require_patterns(model, recorded)
    return recorded | held


class KeepPattern(TrainerCallback):
    """Keeps pruned weights at zero in a `Trainer` of Transformers or TRL: `Trainer(..., callbacks=[KeepPattern()])`.

    As `keep_pattern`; the zeros are checked at the end of the training.
    """

    def __init__(self) -> None:
        self.kept: KeptZeros | None = None

    def on_train_begin(self, *_: Any, **trained: Any) -> None:
        if self.kept is not None:  # the training before was interrupted
            self.kept._remove()
        self.kept = keep_pattern(trained["model"])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.kept is not None:
            self.kept.close()
            self.kept = None


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

    The packed weights stay as they are, and such adapters cannot be merged. Raises `PermpruneError` without PEFT, and
    for "all-linear" targets, by which PEFT finds no packed layer.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        raise PermpruneError(
            'PEFT finds no packed layers as "all-linear": name them in target_modules, such as ["q_proj", "v_proj"]'
        )
    config._register_custom_module(dict.fromkeys((PackedLinear, Int8Linear), _lora_class()))
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
