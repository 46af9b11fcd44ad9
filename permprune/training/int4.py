"""Training through int4: steps run with the weights as int4 stores them, and change the weights before rounding.

The gradient of a stored value is taken for that of its weight (the straight-through estimator of Bengio et al. 2013,
arXiv 1308.3432). Training begins with solved values: each weight is what was rounded to its value last, so that a small
step can move those that are near another value. The scales stay, so that packing changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from permprune.examples import Examples
from permprune.inference.solved import Solved
from permprune.inference.solving import solve_each
from permprune.kernels.product.int4 import stored_values
from permprune.kernels.product.layout import LARGEST_GROUP
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import Layer
from permprune.models.modality import EXAMPLES_PER_WINDOW, kind_of
from permprune.pattern import Pattern

SOLVED = 24
"""Windows on which the values are solved."""


def packable(layers: Iterable[Layer], patterns: Mapping[str, Pattern]) -> dict[str, Layer]:
    """Return those of the layers, by name, that packing replaces."""
    return {
        layer.name: layer
        for layer in layers
        if layer.expert is None and PackedLinear.replaces(layer.owner) and patterns[layer.name].m <= LARGEST_GROUP
    }


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, transposed: bool) -> Tensor:
        values = stored_values(weight.T, scale).T if transposed else stored_values(weight, scale)
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _StoredAsInt4(nn.Module):
    """A parametrization of the weight of a layer, (channels, rows) if it is `transposed`."""

    scale: Tensor

    def __init__(self, scale: Tensor, transposed: bool) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        stored: Tensor = _StraightThrough.apply(weight, self.scale, self.transposed)  # type: ignore[no-untyped-call]
        return stored


@contextmanager
def through_int4(model: PreTrainedModel, layers: Mapping[str, Layer], examples: Examples) -> Iterator[None]:
    """A context in which layers run with their weights as int4 stores them, solved on the first of the `examples`.

    Their parameters have other names inside. At the end the weights are what is stored; after an exception they are
    those before rounding. Without layers it does nothing.
    """
    if not layers:
        yield
        return
    targets, scales = dict[str, Tensor](), dict[str, Tensor]()

    def take(layer: Layer, solved: Solved) -> None:
        layer.weight.copy_(solved.values)
        targets[layer.name], scales[layer.name] = solved.targets.to(layer.weight.dtype), solved.scale

    solve_each(model, layers, examples[: SOLVED * EXAMPLES_PER_WINDOW[kind_of(model)]].trimmed(), take)
    stored = [layers[name] for name in scales]
    with torch.no_grad():
        for layer in stored:
            layer.weight.copy_(targets.pop(layer.name))
    for layer in stored:
        made = _StoredAsInt4(scales[layer.name], layer.transposed)
        parametrize.register_parametrization(layer.owner, "weight", made)
    done = False
    try:
        yield
        done = True
    finally:
        for layer in stored:
            parametrize.remove_parametrizations(layer.owner, "weight", leave_parametrized=done)
