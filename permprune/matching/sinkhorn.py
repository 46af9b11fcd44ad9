"""Relaxed matching: Sinkhorn iterations in the log domain, Gumbel noise on costs, the straight-through estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.matching.assignment import assign, require_costs


def sinkhorn(
    cost: Float[Tensor, "*problems n n"], epsilon: float, iterations: int = 50
) -> Float[Tensor, "*problems n n"]:
    """Minimise <C, P> + epsilon * sum P (log P - 1) over the doubly stochastic P.

    The minimiser is P_ij = exp((f_i + g_j - C_ij) / epsilon); f and g are updated alternately so that rows and
    columns sum to 1 (Li et al. 2026, arXiv 2601.22980; Mena et al. 2018, arXiv 1802.08665). P approaches a
    permutation matrix as epsilon goes to 0.

    `cost` is (..., n, n); each leading index is an independent problem; types narrower than fp32 are computed in
    fp32. Returns P (..., n, n) after `iterations` iterations: its columns sum to 1, and its row sums approach 1.
    Gradients flow through the iterations. `epsilon` is above 0. Raises `PermpruneError` if the matrices are not square
    or a cost is not finite.
    """
    require_costs(cost)
    kernel = cost.to(torch.promote_types(cost.dtype, torch.float32)) / -epsilon
    f, g = torch.zeros_like(kernel[..., 0]), torch.zeros_like(kernel[..., 0])  # potentials, in units of epsilon
    for _ in range(iterations):
        f = -torch.logsumexp(kernel + g[..., None, :], -1)
        g = -torch.logsumexp(kernel + f[..., :, None], -2)
    return (kernel + f[..., :, None] + g[..., None, :]).exp()


def gumbel_noise(shape: Sequence[int], scale: float, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Draw standard Gumbel noise and multiply it by `scale`; returns fp32 of `shape` on the generator's device.

    Added to the costs before the relaxation, the noise explores other permutations, as in the Gumbel-Sinkhorn
    network (Mena et al. 2018, arXiv 1802.08665).
    """
    exponential = torch.empty(*shape, device=generator.device).exponential_(generator=generator)
    return exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_().mul_(-scale)


def straight_through(
    cost: Float[Tensor, "*problems n n"], epsilon: float, iterations: int = 50
) -> Float[Tensor, "*problems n n"]:
    """Return the permutation matrix closest to the plan of `sinkhorn`, (..., n, n), with the gradient of the plan.

    The forward value is exactly a permutation matrix: the assignment that keeps most of the plan's mass. The
    gradient is that of the plan (straight-through estimator, as in PermLLM, Zou et al. 2025).
    """
    soft = sinkhorn(cost, epsilon, iterations)
    hard = torch.zeros_like(soft).scatter_(-1, assign(-soft)[..., None], 1.0)
    return hard + (soft - soft.detach())
