"""Exact assignment, and the cycles of a permutation."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permprune.errors import PermpruneError


def assign(cost: Float[Tensor, "*problems n n"]) -> Int[Tensor, "*problems n"]:
    """Return the permutation with the smallest total cost, exactly (Crouse 2016, shortest augmenting paths).

    `cost` is (..., n, n); each leading index is an independent problem. Returns int64 (..., n) on the device of
    `cost`: p[i] is the column matched with row i, so that p minimises sum_i cost[i, p[i]]; `p.argsort(-1)` is
    its inverse, the row at each column. Raises `PermpruneError` if the matrices are not square or a cost is not
    finite.
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
