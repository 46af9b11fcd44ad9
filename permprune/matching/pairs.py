"""Matching the members of one set with each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from permprune.matching.assignment import require_costs


def pair_up(cost: Float[Tensor, "n n"]) -> Int[Tensor, "pairs 2"]:
    """Disjoint pairs, each of two that are the cheapest for each other among those not yet in a pair.

    `cost` is a symmetric (n, n), whose diagonal is not read. Returns int64 (n // 2, 2), the smaller index first, on the
    device of `cost`: what taking the cheapest pair that is left, over and over, comes to where no costs are equal.
    Raises `PermpruneError` when the matrix is not square or a cost is not finite.
    """
    require_costs(cost)
    left, found = torch.arange(len(cost), device=cost.device), []
    while len(left) > 1:
        open_costs = cost[left][:, left].fill_diagonal_(torch.inf)
        best = open_costs.argmin(1)
        here = torch.arange(len(left), device=cost.device)
        first = ((best[best] == here) & (here < best)).nonzero().flatten()
        if not len(first):  # a ring of equal costs
            first = open_costs.amin(1).argmin()[None]
        pairs = torch.stack([first, best[first]], 1)
        found.append(left[pairs].sort(1).values)
        keep = torch.ones_like(left, dtype=torch.bool)
        keep[pairs.flatten()] = False
        left = left[keep]
    return torch.cat(found) if found else left.new_zeros(0, 2)
