"""The choice of the weights to train."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from torch import Tensor, nn
from transformers import PreTrainedModel

from permprune.errors import PermpruneError
from permprune.models.layers import Layer, blocks, ends_of

TRAINED = ("all", "norms", "head")
"""What can be trained: all weights; norms, biases and the head; or only the head."""


def trained_weights(model: PreTrainedModel, kind: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a kind, one of `TRAINED`, by name.

    The head consists of the linear layers outside the repeated blocks, except for the token embeddings and the layer
    that returns token logits; norms and biases are all parameters of one dimension. Raises `PermpruneError` for an
    unknown kind, and if the model has no such parameters.
    """
    if kind not in TRAINED:
        raise PermpruneError(f'"{kind}" cannot be trained: choose {", ".join(TRAINED)}')
    inside = {id(p) for block in blocks(model) for p in block.parameters()}
    tokens = {id(p) for end in ends_of(model) for p in end.parameters()}
    head = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for p in module.parameters()
        if id(p) not in inside | tokens
    }
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if kind == "all" or id(p) in head or (kind == "norms" and p.dim() == 1)
    }
    if not chosen:
        raise PermpruneError("the model has no head: give --train all, or norms")
    return chosen


def weight_scale(layers: Iterable[Layer]) -> float:
    """Return the root mean square of the layers' nonzero weights, the median over the layers."""

    def scale(weight: Tensor) -> float:
        return float(weight.float().norm()) / math.sqrt(max(1, int(weight.count_nonzero())))

    return median(scale(layer.weight.detach()) for layer in layers)
