"""Which pattern each layer gets in a mix: more weights where the loss feels the layer's error most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.models.layers import Layer
from permprune.pattern import TOTAL, Pattern
from permprune.pruning.problem import Problem
from permprune.saliency.base import Saliency

CHOICES = (Pattern(1, 4), Pattern(2, 4), Pattern(3, 4))
"""Patterns of a mix, the sparsest first: groups of one size, so that the orders to search are those of 2:4."""


@torch.no_grad()
def mix(
    layers: list[Layer],
    problems: Iterable[Problem],
    sites: Mapping[str, str],
    statistics: Statistics,
    saliency: Saliency,
) -> dict[str, Pattern]:
    """A pattern for each layer, by name: the mix of least error that keeps no more weights than `TOTAL`.

    The error of a layer is that of its output in natural order, weighted by how much the loss feels each row: tr(F E H
    E^T), E being the weights that the pattern prunes, H the second moments of the input and F the diagonal of the
    output's Fisher information, twice the layer's share of the loss in a second-order model of it (that of Optimal
    Brain Surgeon, Hassibi and Stork 1993, with independent layers). Layers that share an order get one pattern, so
    that in fold mode all readers of the residual stream do. Choosing one pattern for each group under a budget of
    weights is a multiple-choice knapsack problem, which is solved exactly. Raises `PermpruneError` where it has no
    solution.
    """
    errors = {layer.name: _errors(layer, sites[layer.name], statistics, saliency) for layer in layers}
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    groups = tied(list(sizes), problems)
    chosen = _least(
        np.array([np.sum([errors[name] for name in group], axis=0) for group in groups]),
        np.array([sum(sizes[name] for name in group) for group in groups]),
    )
    return {name: CHOICES[choice] for group, choice in zip(groups, chosen, strict=True) for name in group}


def tied(names: list[str], problems: Iterable[Problem]) -> list[list[str]]:
    """The layers in groups: those that share an order with one another, directly or through others, and the rest."""
    group_of = {name: [name] for name in names}
    for problem in problems:
        groups = {id(group): group for part in problem.parts for group in [group_of[part.layer]]}
        joined = [name for group in groups.values() for name in group]
        group_of.update(dict.fromkeys(joined, joined))
    return list({id(group): group for group in group_of.values()}.values())


def _errors(layer: Layer, site: str, statistics: Statistics, saliency: Saliency) -> list[float]:
    """The error that each of `CHOICES` leaves in a layer."""
    weight, moments, fisher = layer.weight, statistics.moments[site], statistics.fisher[layer.name]
    score = saliency.score(weight, moments)

    def left(mask: Tensor) -> float:
        error = weight * ~mask
        return float(((error @ moments) * error).sum(1) @ fisher)

    return [left(pattern.mask(score)) for pattern in CHOICES]


def _least(errors: np.ndarray, sizes: np.ndarray) -> list[int]:
    """The choice of each group with the least sum of `errors` (groups, choices); `sizes` (groups,) are in weights."""
    unit = gcd(*sizes.tolist())
    kept = np.outer(sizes // unit, [pattern.n for pattern in CHOICES])
    scaled = errors * (1e6 / max(errors.sum(), 1e-300))  # the solver's absolute tolerance is 1e-6
    one_each = LinearConstraint(np.kron(np.eye(len(sizes)), np.ones(len(CHOICES))), 1, 1)
    budget = LinearConstraint(kept.reshape(1, -1), ub=float(sizes.sum() // unit * TOTAL.n))
    found = milp(scaled.flatten(), integrality=1, bounds=Bounds(0, 1), constraints=[one_each, budget])
    if found.x is None:
        raise PermpruneError(f"no mix of patterns was found ({found.message}): take one pattern, as {TOTAL}")
    return [int(choice) for choice in found.x.reshape(kept.shape).argmax(1)]
