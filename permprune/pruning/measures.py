"""How close pruned layers are to the dense ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from permprune.system import sharding


@dataclass(frozen=True)
class LayerMeasure:
    """How close a pruned layer with its current weights is to the dense one.

    `kept` is the share of the squared scores that belongs to non-zero weights; `error` is the relative output error on
    the dense model's inputs, tr(E H E^T) / tr(W H W^T) with E = W - W_eff. `transposed` is whether the weight is stored
    as (inputs, outputs).
    """

    name: str
    transposed: bool
    pattern: str
    kept: float
    error: float


def output_energy(weight: Tensor, moments: Tensor) -> float:
    """Return the mean squared norm of a layer's outputs, tr(W H W^T).

    `weight` is (rows, channels), and `moments` are the second moments of its inputs, (channels, channels).
    """
    return sharding.total(float(((weight.float() @ moments) * weight).sum()))[0]
