"""Training through int4: steps run with the weights as int4 stores them, and change the weights before rounding.

The gradient of a stored value is taken for that of its weight, as in `inference.solving`. Training begins with
solved values: each weight is what was rounded to its value last, so that a small step can move those that are near
another value. The scales stay, so that packing changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.examples import Examples
from permprune.inference.pack import has_packed_form
from permprune.inference.solved import Solved
from permprune.inference.solving import running_with, solve_each
from permprune.kernels.product.int4 import stored_values
from permprune.kernels.product.layout import LARGEST_GROUP
from permprune.models.layers import Layer
from permprune.models.modality import EXAMPLES_PER_WINDOW, kind_of
from permprune.pattern import Pattern

SOLVED = 24
"""Windows on which the values are solved."""


def packable(layers: Iterable[Layer], patterns: Mapping[str, Pattern]) -> dict[str, Layer]:
    """Return those of the layers, by name, that packing replaces."""
    return {layer.name: layer for layer in layers if has_packed_form(layer) and patterns[layer.name].m <= LARGEST_GROUP}


@contextmanager
def through_int4(
    model: PreTrainedModel, layers: Mapping[str, Layer], patterns: Mapping[str, Pattern], examples: Examples
) -> Iterator[None]:
    """A context in which layers run with their weights as int4 stores them, solved on the first of the `examples`.

    `patterns` are by layer, as `layers` are. At the end the weights are what is stored; after an exception they are
    those before rounding. Without layers it does nothing.
    """
    if not layers:
        yield
        return
    targets, scales, paired = dict[Layer, Tensor](), dict[Layer, Tensor](), dict[Layer, bool]()

    def take(layer: Layer, solved: Solved) -> None:
        layer.weight.copy_(solved.values)
        targets[layer], scales[layer] = solved.targets.to(layer.weight.dtype), solved.scale
        paired[layer] = solved.paired

    shown = examples[: SOLVED * EXAMPLES_PER_WINDOW[kind_of(model)]].trimmed()
    solve_each(model, layers, patterns, shown, take)
    with torch.no_grad():
        for layer in scales:
            layer.weight.copy_(targets.pop(layer))

    def stored(layer: Layer, parameter: nn.Parameter) -> Tensor:
        values = stored_values(layer.part_of(parameter.detach()), scales[layer], paired=paired[layer])
        return layer.part_of(values.to(parameter.dtype))

    with running_with({layer: partial(stored, layer) for layer in scales}):
        yield
    with torch.no_grad():
        for layer in scales:
            layer.stored.copy_(stored(layer, layer.stored))
