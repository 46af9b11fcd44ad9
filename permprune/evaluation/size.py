"""The bytes of models: of their weights in a checkpoint, of all tensors, and of pruned weights in theory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from permprune.models.layers import Layer
from permprune.pattern import Pattern

VALUE_BITS = 16
"""Bits of each stored weight, as in models that are served."""


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a checkpoint with the model's parameters in `dtype`, by default each in its own type."""
    return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of a model, tied ones counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def index_bits(pattern: Pattern) -> int:
    """Return the bits that encode which n of a group's m weights are kept: ceil(log2 binom(m, n)).

    For 2:4 this is 4, not 3: hardware stores 2 bits for each kept weight (Mishra et al. 2021, arXiv 2104.08378).
    """
    if pattern == Pattern(2, 4):
        return 4
    return (math.comb(pattern.m // pattern.unit, pattern.n // pattern.unit) - 1).bit_length()


def model_bytes(model: nn.Module, layers: Iterable[Layer], patterns: Mapping[str, Pattern]) -> float:
    """Return the bytes of a model whose `layers` store only the kept weights of their patterns and an index.

    Each stored weight takes `VALUE_BITS` bits, and a group of m weights n * `VALUE_BITS` + `index_bits` bits. Layers
    without a pattern are dense.
    """
    bits = float(VALUE_BITS * sum(parameter.numel() for parameter in model.parameters()))
    for layer in layers:
        if (pattern := patterns.get(layer.name)) is not None:
            group = pattern.n * VALUE_BITS + index_bits(pattern)
            bits += layer.weight.numel() * (group / pattern.m - VALUE_BITS)
    return bits / 8
