"""The choice of one candidate for each layer or head that costs least within a budget: a multiple-choice knapsack."""

from __future__ import annotations

import numpy as np

from permprune.errors import PermpruneError

HALVINGS = 200
"""The most halvings of the range of a price: it ends before with neighbouring floating-point numbers."""

ROUNDING = 1e-9
"""Rounding errors of sums of costs, relative to the largest sum."""


def cheapest(costs: np.ndarray, sizes: np.ndarray, budget: int) -> list[int]:
    """Return the choice of each layer that minimises the sum of `costs` while the sum of `sizes` is within the budget.

    Both are (layers, choices); sizes are whole numbers. The problem is solved exactly, by dynamic programming over the
    choices of the layers so far that are not dominated by others in size and cost, and whose bound is not above the
    cost of a known choice (Dyer, Riha & Walker 1995, "A hybrid dynamic programming/branch-and-bound algorithm for the
    multiple-choice knapsack problem"). The bound is that of Lagrange: with a `price` of the size, a choice costs what
    the cheapest ones at that price cost, plus the `excess` of each layer over its own, plus the price of what is left
    of the budget. Layers whose best choice is the clearest come first, so that few states are left. Raises
    `PermpruneError` if even the smallest choices do not fit, or if a cost is not finite.
    """
    if not np.isfinite(costs).all():
        raise PermpruneError("the cost of a choice is not finite: give other candidates, or other calibration data")
    least = sizes.min(1)
    if least.sum() > budget:
        raise PermpruneError(f"the smallest choices take {least.sum():,} of {budget:,}")
    costs = costs - costs.min(1, keepdims=True)
    price = _price(costs, sizes, budget)
    total = costs + price * sizes
    excess = total - total.min(1, keepdims=True)
    known = _sum_of(costs, _filled(costs, sizes, budget, _at_price(costs, sizes, price)))
    gap = known - (total.min(1).sum() - price * budget) + ROUNDING * costs.max(1).sum()
    order = np.argsort(-np.sort(excess, axis=1)[:, :2][:, -1])  # by the second least: the least is 0
    least_later, most_later = (ends[order][::-1].cumsum()[::-1] - ends[order] for ends in (least, sizes.max(1)))
    above, size, cost = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for place, layer in enumerate(order):
        above, size, cost = (
            (sums[:, None] + own[layer]).ravel() for sums, own in ((above, excess), (size, sizes), (cost, costs))
        )
        unused = np.maximum(0, budget - size - most_later[place])
        kept = np.flatnonzero((size + least_later[place] <= budget) & (above + price * unused <= gap))
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        lowest = np.minimum.accumulate(cost[kept])
        kept = kept[np.append(True, cost[kept][1:] < lowest[:-1])]
        steps.append(kept)
        above, size, cost = above[kept], size[kept], cost[kept]
    chosen, state = np.empty(len(costs), dtype=np.int64), int(cost.argmin())
    for layer, kept in zip(order[::-1], steps[::-1], strict=True):
        state, chosen[layer] = divmod(int(kept[state]), costs.shape[1])
    return [int(choice) for choice in chosen]


def _sum_of(values: np.ndarray, choice: np.ndarray) -> float:
    """The sum of the values (layers, choices) of a choice."""
    return float(values[np.arange(len(values)), choice].sum())


def _at_price(costs: np.ndarray, sizes: np.ndarray, price: float) -> np.ndarray:
    """The choice of each layer that costs least if its size has a price, of equal ones the smallest."""
    total = costs + price * sizes
    cheap = total <= total.min(1, keepdims=True)
    chosen: np.ndarray = np.argmin(np.where(cheap, sizes, np.iinfo(np.int64).max), axis=1)
    return chosen


def _price(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The lowest price, up to rounding, at which the cheapest choices fit into the budget: the bound is highest there.

    Costs are 0 or more. As sizes are whole numbers, with a price above all costs the smallest choices are cheapest.
    """
    low, high = 0.0, float(costs.max()) + 1.0
    if _sum_of(sizes, _at_price(costs, sizes, low)) <= budget:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        fits = _sum_of(sizes, _at_price(costs, sizes, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return high


def _filled(costs: np.ndarray, sizes: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """A choice that fits, improved as long as a larger candidate of a layer fits, the most efficient one first."""
    layers, choice = np.arange(len(costs)), choice.copy()
    while True:
        gained = costs[layers, choice][:, None] - costs
        taken = sizes - sizes[layers, choice][:, None]
        fits = (gained > 0) & (taken <= budget - sizes[layers, choice].sum())
        if not fits.any():
            return choice
        efficiency = np.where(fits, gained / np.maximum(taken, 0.5), -1.0)
        layer, better = np.unravel_index(efficiency.argmax(), efficiency.shape)
        choice[layer] = better
