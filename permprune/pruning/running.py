"""Layers whose modules run with other weights than those that the model holds."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from permprune.kernels.product.masked import MaskedWeight, PackedWeights
from permprune.models.hooks import replaced_while_running
from permprune.models.layers import Layer
from permprune.models.narrow_weights import NarrowWeights, computed_type
from permprune.system.device import autocast_dtype


class RunningLayers(ABC):
    """Layers, by name, that run with the weights of `_shown` while they are attached.

    Such a weight is in memory only while its module runs. `held` are the weights of the model that are held in bf16.
    `by_parameter` are the layers whose weights are parts of each parameter: several, of experts.
    """

    def __init__(self, layers: Iterable[Layer], held: NarrowWeights) -> None:
        self.layers, self.held = {layer.name: layer for layer in layers}, held
        self.by_parameter: dict[str, list[Layer]] = {}
        for layer in self.layers.values():
            self.by_parameter.setdefault(layer.parameter, []).append(layer)
        self._handles: list[RemovableHandle] = []
        self._packed: PackedWeights | None = None

    @abstractmethod
    def _shown(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a weight that is shown, (rows, channels), in `dtype`, by default the type of the dense weight."""

    @abstractmethod
    def _multiplied(self, layer: Layer) -> Tensor | None:
        """Return a weight that is shown as a product without gradients reads it fastest, or None where it is dense."""

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Return a context manager inside which the model runs with its dense weights; it may be entered twice."""
        attached = bool(self._handles)
        self.detach()
        try:
            yield
        finally:
            if attached:
                self.attach()

    @contextmanager
    def packed_once(self) -> Iterator[None]:
        """Return a context manager inside which the weights that are shown do not change, and are packed once."""
        self._packed = PackedWeights()
        try:
            yield
        finally:
            self._packed = None

    def _product(self, layer: Layer) -> Tensor | None:
        """The `_multiplied` of a layer, which inside `packed_once` keeps what a product packs."""
        weight = self._multiplied(layer)
        if self._packed is not None and isinstance(weight, MaskedWeight):
            self._packed.lend(layer.name, weight)
        return weight

    def detach(self) -> None:
        """Let the model run with its own weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def attach(self) -> None:
        """Let the modules of the layers run with the weights that are shown."""
        reference = weakref.ref(self)  # the model must not keep layers alive that are not used any more
        for parts in self.by_parameter.values():

            def shown(stored: nn.Parameter, parts: list[Layer] = parts) -> Tensor | None:
                running = reference()
                if running is None:
                    return None
                alone = len(parts) == 1 and not torch.is_grad_enabled()
                product = running._product(parts[0]) if alone else None
                return running._stored(parts, stored) if product is None else product

            self._handles += replaced_while_running(parts[0].owner, parts[0].attribute, shown)

    @torch.no_grad()
    def _stored(self, layers: list[Layer], stored: nn.Parameter) -> Tensor:
        """Return the parameter of these layers with the weights that are shown."""
        (first, *others) = layers
        if first.expert is None and not others:
            weight = self._shown(first.name, autocast_dtype(stored.device))  # as the product would convert it
            return weight.T if first.transposed else weight
        dtype = computed_type(stored) if first.parameter in self.held.types else stored.dtype
        whole = stored.detach().to(dtype, copy=True)
        for layer in layers:
            layer.part_of(whole).copy_(self._shown(layer.name, whole.dtype))
        return whole
