"""The choice of one candidate for each layer or head that costs least within a budget: a multiple-choice knapsack."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from permprune.errors import PermpruneError


def cheapest(costs: np.ndarray, sizes: np.ndarray, budget: int) -> list[int]:
    """Return the choice of each layer that minimises the sum of `costs` while the sum of `sizes` is within the budget.

    Both are (layers, choices); sizes are whole numbers. The problem is solved exactly. Raises `PermpruneError` if even
    the smallest choices do not fit.
    """
    least = int(sizes.min(1).sum())
    if least > budget:
        raise PermpruneError(f"the smallest choices take {least:,} of {budget:,}")
    layers, choices = costs.shape
    unit = int(np.gcd.reduce(sizes, axis=None))
    above = costs - costs.min(1, keepdims=True)
    scaled = above * (1e6 / max(above.sum(), 1e-300))  # the solver's absolute tolerance is 1e-6
    one_each = LinearConstraint(csr_array(kron(eye_array(layers), np.ones((1, choices)))), 1, 1)
    within = LinearConstraint(csr_array(sizes.reshape(1, -1) / unit), ub=budget // unit)
    solved = milp(scaled.flatten(), integrality=1, bounds=Bounds(0, 1), constraints=[one_each, within])
    if solved.x is None:
        raise PermpruneError(f"no choice for each layer was found ({solved.message}): choose one for all layers")
    return [int(choice) for choice in solved.x.reshape(costs.shape).argmax(1)]
