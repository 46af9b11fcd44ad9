"""Mixed patterns: an N:M pattern for each layer, denser for layers whose errors raise the loss more."""

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
"""The patterns of a mix, sparsest first. All have groups of 4, so that the orders to search are the same as for 2:4."""


@torch.no_grad()
def mix(
    layers: list[Layer],
    problems: Iterable[Problem],
    sites: Mapping[str, str],
    statistics: Statistics,
    saliency: Saliency,
) -> dict[str, Pattern]:
    """Choose a pattern for each layer, by name: the mix of least error that keeps no more weights than `TOTAL`.

    The error of a layer is its output error in natural order, with each row weighted by the sensitivity of the loss:
    tr(F E H E^T), where E are the weights that the pattern prunes, H the second moments of the input and F the diagonal
    of the output's Fisher information. It is twice the layer's contribution in a second-order model of the loss (that
    of Optimal Brain Surgeon, Hassibi and Stork 1993, with independent layers). `sites` maps each layer to the name of
    the tensor that it reads. Layers that share an order get the same pattern; in fold mode these are, among others, all
    layers that read the residual stream. Choosing a pattern for each group of layers under a budget of weights is a
    multiple-choice knapsack problem, which is solved exactly. Raises `PermpruneError` if it has no solution.
    """
    errors = {layer.name: _errors(layer, sites[layer.name], statistics, saliency) for layer in layers}
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    groups = tied(list(sizes), problems)
    chosen = least_error(
        np.array([np.sum([errors[name] for name in group], axis=0) for group in groups]),
        np.array([sum(sizes[name] for name in group) for group in groups]),
    )
    return {name: CHOICES[choice] for group, choice in zip(groups, chosen, strict=True) for name in group}


def tied(names: list[str], problems: Iterable[Problem]) -> list[list[str]]:
    """Group the layers that share an order, directly or through other layers; each remaining layer is its own group."""
    group_of = {name: [name] for name in names}
    for problem in problems:
        groups = {id(group): group for part in problem.parts for group in [group_of[part.layer]]}
        joined = [name for group in groups.values() for name in group]
        group_of.update(dict.fromkeys(joined, joined))
    return list({id(group): group for group in group_of.values()}.values())


def _errors(layer: Layer, site: str, statistics: Statistics, saliency: Saliency) -> list[float]:
    """Return the error that each of `CHOICES` causes in a layer."""
    weight, moments, fisher = layer.weight.float(), statistics.moments[site], statistics.fisher[layer.name]
    score = saliency.score(weight, moments)

    def left(mask: Tensor) -> float:
        error = weight * ~mask
        return float(((error @ moments) * error).sum(1) @ fisher)

    return [left(pattern.mask(score)) for pattern in CHOICES]


def least_error(errors: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Return the choice of each group that minimises the sum of `errors` (groups, choices) within the budget.

    `sizes` (groups,) are numbers of weights.
    """
    unit = gcd(*sizes.tolist())
    kept = np.outer(sizes // unit, [pattern.n for pattern in CHOICES])
    scaled = errors * (1e6 / max(errors.sum(), 1e-300))  # the solver's absolute tolerance is 1e-6
    one_each = LinearConstraint(np.kron(np.eye(len(sizes)), np.ones(len(CHOICES))), 1, 1)
    budget = LinearConstraint(kept.reshape(1, -1), ub=float(sizes.sum() // unit * TOTAL.n))
    solved = milp(scaled.flatten(), integrality=1, bounds=Bounds(0, 1), constraints=[one_each, budget])
    if solved.x is None:
        raise PermpruneError(f"no mix of patterns was found ({solved.message}): take one pattern, as {TOTAL}")
    return [int(choice) for choice in solved.x.reshape(kept.shape).argmax(1)]
