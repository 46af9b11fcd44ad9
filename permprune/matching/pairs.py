"""Matching the members of one set in pairs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from permprune.matching.assignment import require_costs


def pair_up(cost: Float[Tensor, "n n"]) -> Int[Tensor, "pairs 2"]:
    """Divide n members greedily into disjoint pairs.

    Each step forms all pairs of members that are each other's cheapest partner among those still unpaired. If no two
    costs are equal, the result is the same as that of repeatedly taking the cheapest remaining pair.

    `cost` is a symmetric (n, n); its diagonal is ignored. Returns int64 (n // 2, 2) on the device of `cost`, with the
    smaller index of each pair first. Raises `PermpruneError` if the matrix is not square or a cost is not finite.
    """
    require_costs(cost)
    left, pairs_of_step = torch.arange(len(cost), device=cost.device), []
    while len(left) > 1:
        open_costs = cost[left][:, left].fill_diagonal_(torch.inf)
        best = open_costs.argmin(1)
        here = torch.arange(len(left), device=cost.device)
        first = ((best[best] == here) & (here < best)).nonzero().flatten()
        if not len(first):  # a cycle of equal costs
            first = open_costs.amin(1).argmin()[None]
        pairs = torch.stack([first, best[first]], 1)
        pairs_of_step.append(left[pairs].sort(1).values)
        keep = torch.ones_like(left, dtype=torch.bool)
        keep[pairs.flatten()] = False
        left = left[keep]
    return torch.cat(pairs_of_step) if pairs_of_step else left.new_zeros(0, 2)
