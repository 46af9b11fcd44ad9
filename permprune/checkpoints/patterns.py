"""The N:M patterns of a model's layers, according to its record or detected from its weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from permprune.checkpoints.record import PrunedLayer
from permprune.checkpoints.schema import Malformed
from permprune.errors import PermpruneError
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import Layer, linears_of
from permprune.pattern import Pattern, tightest

Patterns = dict[str, Pattern]
"""Patterns by the name of the layer."""


def recorded_patterns(model: nn.Module, layers: Iterable[PrunedLayer]) -> Patterns:
    """The pattern of each layer in a record. Raises `Malformed` if the model has no such layer or M does not fit it."""
    linears = linear_layers(model)
    for row in layers:
        if row.name not in linears or linears[row.name].transposed != row.transposed:
            raise Malformed(f"the model has no such layer as {row.name!r}")
        if not Pattern.parse(row.pattern).divides(width := linears[row.name].weight.shape[1]):
            raise Malformed(f"{row.name} has rows of {width} weights, which {row.pattern} does not fit")
    return {row.name: Pattern.parse(row.pattern) for row in layers}


def held_patterns(model: nn.Module) -> Patterns:
    """The sparsest pattern (see `tightest`) that each linear layer's weights satisfy; dense layers are left out."""
    patterns = {name: tightest(layer.weight) for name, layer in linear_layers(model).items()}
    return {name: pattern for name, pattern in patterns.items() if pattern}


def require_patterns(model: nn.Module, patterns: Patterns) -> None:
    """Raise `PermpruneError` unless the weights of every layer, as stored, satisfy its pattern."""
    linears = linear_layers(model)
    for name, pattern in patterns.items():
        if not pattern.holds(linears[name].weight):
            raise PermpruneError(f"{name} is not {pattern} in stored order: prune the model again")


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """All linear layers of a model by name, whether pruned, packed or dense."""
    linears = {}
    for name, module in model.named_modules():
        packed = isinstance(module, PackedLinear)
        layers = [Layer(name, module, module.transposed)] if packed else linears_of(name, module)
        linears.update({layer.name: layer for layer in layers})
    return linears
