"""Weights of layers held in the type in which their checkpoint stores them, in a model that computes as in fp32."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from permprune.models.hooks import replaced_while_running
from permprune.models.layers import Layer, ends_of


def held_type(stored: torch.dtype) -> torch.dtype:
    """Return the type in which a search holds the weights of layers that a checkpoint stores in type `stored`."""
    return torch.bfloat16 if is_narrow(stored) else torch.float32


def is_narrow(stored: torch.dtype) -> bool:
    """Whether a search holds weights that are stored in this type in 16 bits."""
    return stored == torch.bfloat16


def end_weights(model: nn.Module) -> list[tuple[nn.Parameter, list[nn.Module]]]:
    """Return the weights of a Transformer's embedding table and output layer, each with the modules that own it.

    Subclasses are left out: their code may read the type of the weights.
    """
    weights: dict[int, tuple[nn.Parameter, list[nn.Module]]] = {}
    for module in ends_of(model):
        if type(module) in (nn.Embedding, nn.Linear):
            weight = module.get_parameter("weight")
            weights.setdefault(id(weight), (weight, []))[1].append(module)
    return list(weights.values())


class NarrowWeights:
    """Holds fp32 weights of layers in bf16, without a change of any value.

    This applies to models that were stored in bf16 (`stored`) and converted to fp32 when they were read, and there to
    each parameter all of whose values bf16 represents. Modules run with the weights in fp32, or inside autocast to bf16
    with those that are held: it would round them to the same values. Gradients of the parameters have their type, bf16.
    The embedding table and the output layer are held likewise, tied or not; embeddings come out in fp32.

    `types` are the types to which `release` converts the parameters back, by name. That also happens when this object
    is deleted.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer], stored: torch.dtype) -> None:
        self.types: dict[str, torch.dtype] = {}
        held: list[nn.Parameter] = []
        handles: list[RemovableHandle] = []
        self._release = weakref.finalize(self, _release, held, handles)
        self._release.atexit = False
        if not is_narrow(stored):
            return
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())  # their code reads the type of the weights
        for name, layer in {layer.parameter: layer for layer in layers}.items():
            parameter = layer.stored
            if owners[id(parameter)] > 1 or any(part in wide for part in name.split(".")) or not _narrow(parameter):
                continue
            self.types[name] = torch.float32
            held.append(parameter)
            handles += replaced_while_running(layer.owner, name.rpartition(".")[2], _computed)
        for parameter, modules in end_weights(model):
            if owners[id(parameter)] == len(modules) and _narrow(parameter):
                held.append(parameter)
                for module in modules:
                    handles += _in_fp32(module)

    def release(self) -> None:
        """Convert the parameters back to fp32."""
        self.types = {}
        self._release()


def computed_type(held: Tensor) -> torch.dtype:
    """The type in which a module computes with weights that are held in bf16."""
    return held.dtype if torch.is_autocast_enabled(held.device.type) else torch.float32


def _in_fp32(module: nn.Module) -> list[RemovableHandle]:
    """Let an embedding table or a linear layer whose weight is held in bf16 compute as with its weight in fp32."""
    if isinstance(module, nn.Embedding):  # rows are converted after they are looked up: the table is large
        return [module.register_forward_hook(lambda _module, _inputs, rows: rows.float())]
    return replaced_while_running(module, "weight", _computed)


def _narrow(parameter: nn.Parameter) -> bool:
    """Convert a parameter from fp32 to bf16 if that changes no value; returns whether it did."""
    if parameter.dtype != torch.float32:
        return False
    narrow = parameter.data.bfloat16()
    if not torch.equal(narrow.float(), parameter.data):
        return False
    parameter.data = narrow
    return True


def _computed(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(computed_type(parameter))


def _release(held: list[nn.Parameter], handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    for parameter in held:
        parameter.data = parameter.data.float()
