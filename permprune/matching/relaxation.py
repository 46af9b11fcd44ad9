"""From costs to a permutation matrix that a forward pass can use and a backward pass can learn through."""

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
    """`scale` times standard Gumbel noise, fp32 of that shape on the generator's device.

    Added to the costs before a relaxation it is the exploration of the Gumbel-Sinkhorn network (Mena et al.
    2018, arXiv 1802.08665). Raises `PermpruneError` for a negative scale.
    """
    if not 0 <= scale < math.inf:
        raise PermpruneError(f"the scale of the Gumbel noise is {scale}: give a number from 0 up")
    exponential = torch.empty(*shape, device=generator.device).exponential_(generator=generator)
    return exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_().mul_(-scale)


def straight_through(
    cost: Float[Tensor, "*problems n n"], epsilon: float, iterations: int = 50
) -> Float[Tensor, "*problems n n"]:
    """The permutation matrix nearest to the plan of `sinkhorn`, (..., n, n), with the gradient of the plan.

    Forward it is exactly a permutation, the assignment that keeps most of the plan's mass; backward it is the
    plan (PermLLM, Zou et al. 2025).
    """
    soft = sinkhorn(cost, epsilon, iterations)
    hard = torch.zeros_like(soft).scatter_(-1, assign(-soft)[..., None], 1.0)
    return hard + (soft - soft.detach())
