"""Entropy-regularised matching: a doubly stochastic matrix of low cost, by Sinkhorn iterations in the log domain."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.matching.assignment import require_costs


def sinkhorn(
    cost: Float[Tensor, "*problems n n"], epsilon: float, iterations: int = 50
) -> Float[Tensor, "*problems n n"]:
    """Minimise <C, P> + epsilon * sum P (log P - 1) over the doubly stochastic P.

    The minimiser is P_ij = exp((f_i + g_j - C_ij) / epsilon); f and g are updated alternately so that rows and
    columns sum to 1 (Li et al. 2026, arXiv 2601.22980; Mena et al. 2018, arXiv 1802.08665). P approaches a
    permutation matrix as epsilon goes to 0.

    `cost` is (..., n, n); each leading index is an independent problem; types narrower than fp32 are computed in
    fp32. Returns P (..., n, n) after `iterations` iterations: its columns sum to 1, and its row sums approach 1.
    Gradients flow through the iterations. Raises `PermpruneError` if the matrices are not square, a cost is not
    finite, or an argument is out of range.
    """
    require_costs(cost)
    if not 0 < epsilon < math.inf:
        raise PermpruneError(f"epsilon is {epsilon}: give a positive number")
    if iterations < 1:
        raise PermpruneError(f"{iterations} Sinkhorn iterations are too few: give at least 1")
    kernel = cost.to(torch.promote_types(cost.dtype, torch.float32)) / -epsilon
    f, g = torch.zeros_like(kernel[..., 0]), torch.zeros_like(kernel[..., 0])  # potentials, in units of epsilon
    for _ in range(iterations):
        f = -torch.logsumexp(kernel + g[..., None, :], -1)
        g = -torch.logsumexp(kernel + f[..., :, None], -2)
    return (kernel + f[..., :, None] + g[..., None, :]).exp()
