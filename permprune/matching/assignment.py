"""Exact assignment and the cycles of a permutation, and the division of a set into pairs or into random parts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permprune.errors import PermpruneError


def assign(cost: Float[Tensor, "*problems n n"]) -> Int[Tensor, "*problems n"]:
    """Return the permutation with the smallest total cost, exactly (Crouse 2016, shortest augmenting paths).

    `cost` is (..., n, n); each leading index is an independent problem. Returns int64 (..., n) on the device of `cost`:
    p[i] is the column matched with row i, so that p minimises sum_i cost[i, p[i]]; `p.argsort(-1)` is its inverse, the
    row at each column. Raises `PermpruneError` if the matrices are not square or a cost is not finite.
    """
    require_costs(cost)
    problems = cost.detach().flatten(0, -3) if cost.dim() > 2 else cost.detach()[None]
    solved = [torch.as_tensor(linear_sum_assignment(c.numpy())[1]) for c in problems.double().cpu()]
    return torch.stack(solved).view(cost.shape[:-1]).to(cost.device)


def cycles(permutation: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Label each element of a permutation (n,) with the smallest element of its cycle; returns int64 (n,)."""
    step = permutation.tolist()
    label = [-1] * len(step)
    for start in range(len(step)):
        element = start
        while label[element] < 0:
            label[element] = start
            element = step[element]
    return torch.tensor(label, device=permutation.device)


def require_costs(cost: Tensor) -> None:
    """Raise `PermpruneError` unless `cost` is (..., n, n), not empty and finite."""
    if cost.dim() < 2 or cost.shape[-1] != cost.shape[-2] or not cost.numel():
        raise PermpruneError(f"costs of shape {tuple(cost.shape)} cannot be matched: give square matrices (..., n, n)")
    if not torch.isfinite(cost).all():
        raise PermpruneError("a cost is NaN or infinite: check what the costs were computed from for overflow")


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


def random_parts(count: int, largest: int, generator: torch.Generator) -> list[Int[Tensor, " members"]]:
    """Divide `count` members into as few parts as possible, at random, with at most `largest` members each.

    The sizes of the parts differ by at most 1, as far as they can. Returns the members of each part, int64, in
    ascending order. If one part is enough, nothing is drawn from the generator.
    """
    parts = part_count(count, largest)
    if parts == 1:
        return [torch.arange(count)]
    return [part.sort().values for part in torch.randperm(count, generator=generator).tensor_split(parts)]


def part_count(count: int, largest: int) -> int:
    """Return the number of parts into which `random_parts` divides `count` members."""
    return max(1, -(-count // largest))


def groups_in(channels: int, m: int) -> int:
    """Return the number of groups of `m` in a part of at most `channels` channels, which has at least two."""
    return max(2, channels // m)
