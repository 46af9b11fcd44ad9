"""Differentiable permutation matrices: Gumbel noise on costs, and the straight-through estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.matching.assignment import assign
from permprune.matching.sinkhorn import sinkhorn


def gumbel_noise(shape: Sequence[int], scale: float, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Draw standard Gumbel noise and multiply it by `scale`; returns fp32 of `shape` on the generator's device.

    Added to the costs before the relaxation, the noise explores other permutations, as in the Gumbel-Sinkhorn
    network (Mena et al. 2018, arXiv 1802.08665). Raises `PermpruneError` unless `scale` is finite and at least 0.
    """
    if not 0 <= scale < math.inf:
        raise PermpruneError(f"the scale of the Gumbel noise is {scale}: give a number from 0 up")
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
