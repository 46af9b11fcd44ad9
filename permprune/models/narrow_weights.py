"""Weights held in the type in which their checkpoint stores them, in a model that computes as in fp32."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from permprune.models.hooks import replaced_while_running
from permprune.models.layers import Layer, block_linears, ends_of, rests, values_of


def held_type(stored: torch.dtype) -> torch.dtype:
    """Return the type in which a search holds the weights of layers that a checkpoint stores in type `stored`."""
    return torch.bfloat16 if is_narrow(stored) else torch.float32


def is_narrow(stored: torch.dtype) -> bool:
    """Whether a search holds weights that are stored in this type in 16 bits."""
    return stored == torch.bfloat16


def narrowed(parameter: nn.Parameter) -> bool:
    """Convert a parameter in fp32 to bf16 if that changes no value; returns whether it did, or rests in bf16."""
    if parameter.dtype != torch.float32 or rests(parameter):
        return rests(parameter) and parameter.dtype == torch.bfloat16
    narrow = parameter.data.bfloat16()
    if not torch.equal(narrow.float(), parameter.data):
        return False
    parameter.data = narrow
    return True


def held_bytes(model: nn.Module, stored: torch.dtype) -> int:
    """Return the bytes of the weights of a model that is read to be pruned; it may be on the meta device."""
    kept = {id(one.parameter) for one in _holdable(model, block_linears(model))} if is_narrow(stored) else set()
    return sum(weight.numel() * (2 if id(weight) in kept else 4) for weight in model.parameters())


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


def holdable_ends(model: nn.Module) -> list[nn.Parameter]:
    """Return those of `end_weights` that can be held in bf16."""
    return [one.parameter for one in _holdable(model, ())]


class NarrowWeights:
    """Holds weights in bf16 in a model that computes as in fp32.

    Modules run with the weights in fp32, or inside autocast to bf16 with those that are held: it would round them to
    the same values. Gradients of the parameters have their type, bf16. Embeddings come out in fp32. `before` are the
    types of what was or will be converted, and `types` those that a model in fp32 has for the layers' held parameters.
    """

    def __init__(self, held: list[_Holdable], before: list[tuple[Tensor, torch.dtype]]) -> None:
        self._held, self._before = held, before
        self.types = dict.fromkeys((one.name for one in held if one.name is not None), torch.float32)
        self._handles: list[RemovableHandle] = []
        self._release = weakref.finalize(self, _release, before, self._handles)
        self._release.atexit = False
        self._attach()

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[Layer], stored: torch.dtype) -> NarrowWeights:
        """Hold parameters of a model in fp32 that was read in the type `stored`, if that is bf16.

        These are those of the layers and of the model's ends all of whose values bf16 represents, so that none changes.
        """
        holdable = _holdable(model, layers) if is_narrow(stored) else []
        held = [one for one in holdable if narrowed(one.parameter)]
        return cls(held, [(one.parameter, torch.float32) for one in held if not rests(one.parameter)])

    @classmethod
    def as_read(cls, model: nn.Module) -> NarrowWeights:
        """Let a model compute in fp32 that has the types of its checkpoint, without a second copy of its weights.

        Those of linear layers in its blocks and of its ends that are in bf16 are held; all else becomes fp32.
        """
        held = [one for one in _holdable(model, block_linears(model)) if one.parameter.dtype == torch.bfloat16]
        kept = {id(one.parameter) for one in held}
        others = [*model.parameters(), *model.buffers()]
        wide = [one for one in others if one.is_floating_point() and one.dtype != torch.float32 and id(one) not in kept]
        narrow = cls(held, [(one, one.dtype) for one in wide])
        for tensor in wide:
            tensor.data = tensor.data.float()
        return narrow

    def _attach(self) -> None:
        for one in self._held:
            for module, attribute in one.places:
                if isinstance(module, nn.Embedding):  # rows are converted after they are looked up: the table is large
                    self._handles.append(module.register_forward_hook(_wide_rows))
                else:
                    self._handles += replaced_while_running(module, attribute, _computed)

    @property
    def active(self) -> bool:
        """Whether weights are held."""
        return bool(self._held) and self._release.alive

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """A context in which the model has the types in which it was read, for code that has to see its own operations.

        Without weights that are held nothing changes.
        """
        if not self.active:
            yield
            return
        present = [(tensor, tensor.dtype) for tensor, _ in self._before]
        _release(self._before, self._handles)
        try:
            yield
        finally:
            _convert(present)
            self._attach()

    def release(self) -> None:
        """Convert everything back to the types of before: those of fp32, or those in which the model was read.

        It also happens when this object is deleted.
        """
        self.types = {}
        self._release()


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes in fp32, with one layer's weights in fp32 at a time if they are in bf16."""
    held = NarrowWeights.as_read(model)
    try:
        yield
    finally:
        held.release()


def computed_type(held: Tensor) -> torch.dtype:
    """The type in which a module computes with weights that are held in bf16."""
    return held.dtype if torch.is_autocast_enabled(held.device.type) else torch.float32


@dataclass(frozen=True)
class _Holdable:
    """A parameter that can be held in bf16, with the modules and attributes that have it; those of ends lack a name."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    name: str | None = None


def _holdable(model: nn.Module, layers: Iterable[Layer]) -> list[_Holdable]:
    """The parameters of layers and of the model's ends that no other module has, nor code that reads their type."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    holdable = [
        _Holdable(layer.stored, [(layer.owner, layer.attribute)], name)
        for name, layer in {layer.parameter: layer for layer in layers}.items()
        if owners[id(layer.stored)] == 1 and not any(part in wide for part in name.split("."))
    ]
    for parameter, modules in end_weights(model):
        if owners[id(parameter)] == len(modules):
            holdable.append(_Holdable(parameter, [(module, "weight") for module in modules]))
    return holdable


def _wide_rows(_module: nn.Module, _inputs: object, rows: Tensor) -> Tensor:
    return rows.float()


def _computed(parameter: nn.Parameter) -> Tensor:
    return values_of(parameter).to(computed_type(parameter))


def _release(before: list[tuple[Tensor, torch.dtype]], handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
    _convert(before)


def _convert(types: list[tuple[Tensor, torch.dtype]]) -> None:
    for tensor, dtype in types:
        tensor.data = tensor.data.to(dtype)
