"""Weight updates that are given by name: none, SparseGPT and ADMM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from permprune.errors import PermpruneError
from permprune.options import Count, Natural, NonNegative, Positive
from permprune.pattern import Pattern
from permprune.registry import method_of
from permprune.system.imports import on_first_use
from permprune.updates.base import LayerUpdate, Update

with on_first_use(globals()):
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from permprune.calibration.moments import cholesky, inverse_factor, root_mean_square
    from permprune.examples import Examples
    from permprune.pruning.network import PrunedNetwork
    from permprune.system.device import fast_dtype
    from permprune.system.search_state import Resumable

LEAST = 0.03
"""The least root mean square by which a channel is scaled, relative to the median of all. A channel that is almost zero
would otherwise stand for others that are pruned, with weights a hundred thousand times as large as theirs."""

WIDE = 1024
"""The channels from which on products in bf16 take much less time than those in fp32."""

SAMPLE = 65_536
"""About how many scores of a matrix give the limit of a mask: to select among all takes as long as the products."""


@dataclass(frozen=True)
class NoUpdate(Update):
    """Apply the masks only: every remaining weight keeps its value."""

    name: ClassVar[str] = "none"

    def run(
        self, network: PrunedNetwork, examples: Examples, *, saved: Resumable | None = None, limit: float = math.inf
    ) -> None:
        """Leave the network as it is."""


@dataclass(frozen=True)
class SparseGPT(LayerUpdate):
    """Optimal Brain Surgeon, column by column (Frantar & Alistarh 2023, arXiv 2301.00774, section 3).

    The columns are processed in stored order. In each group of a row the weights with the largest w^2 / [(H_F)^-1]_jj
    are kept, where F are the columns from j on. The columns that are not yet processed are
    updated to compensate for the error of each pruned weight. `damping` is added to the diagonal of H, in units of its
    mean. `block` columns (rounded down to whole groups) are processed before the columns after them are updated. A
    channel that is always zero is pruned before any other.
    """

    name: ClassVar[str] = "sparsegpt"
    damping: NonNegative = 0.01
    block: Count = 128

    def apply(
        self,
        weight: Float[Tensor, "rows channels"],
        moments: Float[Tensor, "channels channels"],
        order: Int[Tensor, " channels"],
        pattern: Pattern,
    ) -> Float[Tensor, "rows channels"]:
        pattern.require_divisible(weight.shape[1], "a weight matrix")
        order = order.to(weight.device)
        factor = inverse_factor(moments[order][:, order], self.damping)
        factor.diagonal().masked_fill_(moments.diagonal()[order] == 0, torch.inf)  # pruning these costs nothing
        columns = weight.T[order].contiguous()  # each column is contiguous in memory
        width = max(1, self.block // pattern.m) * pattern.m
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            errors = _sweep(columns[start:stop], factor[start:stop, start:stop], pattern)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        pruned = torch.empty_like(weight)
        pruned[:, order] = columns.T
        return pruned


def _sweep(columns: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Prune (k, rows) columns in place, group by group.

    Returns the errors of the columns, (k, rows), for which the columns after them have to compensate.
    """
    errors = torch.zeros_like(columns)
    scale = factor.diagonal()[:, None]
    for start in range(0, len(columns), pattern.m):
        stop = start + pattern.m
        group = columns[start:stop]
        keep = pattern.mask_groups(group.abs() / scale[start:stop], 0)
        for i in range(pattern.m):
            column, dropped = start + i, ~keep[i]
            torch.mul(group[i] / scale[column], dropped, out=errors[column])
            group[i].masked_fill_(dropped, 0)
            group[i + 1 :].addr_(factor[column, column + 1 : stop], errors[column], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors


@dataclass(frozen=True)
class ADMM(LayerUpdate):
    """The least output error that the remaining weights allow, by ADMM (Boža 2024, arXiv 2401.02938).

    The alternating direction method of multipliers solves min tr(E H E^T), E the change of the weights, over weights
    that the pattern allows. Channels are scaled so that the diagonal of H is 1, or less where a channel is almost zero
    (`LEAST`); `damping` is then added to it. All rows share one inverse, that of H + `penalty` * I, and each of the
    `iterations` multiplies all of them by it, of wide layers in bf16 where that is fast.

    The first `gradual` iterations choose the mask: a weight's score is the magnitude of its current
    value plus that of its multiplier. The N largest scores of each group are kept, and of the others those that are
    large within the layer; their number falls to zero along the paper's cubic schedule. With 0, the scores are those of
    Wanda. A channel that is always zero is pruned before any other. Raises `PermpruneError` if `gradual` is larger than
    `iterations`.
    """

    name: ClassVar[str] = "admm"
    damping: NonNegative = 0.1
    penalty: Positive = 1.0
    iterations: Count = 20
    gradual: Natural = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradual > self.iterations:
            raise PermpruneError(f"gradual is {self.gradual}: give at most the number of iterations, {self.iterations}")

    def apply(
        self,
        weight: Float[Tensor, "rows channels"],
        moments: Float[Tensor, "channels channels"],
        order: Int[Tensor, " channels"],
        pattern: Pattern,
    ) -> Float[Tensor, "rows channels"]:
        pattern.require_divisible(weight.shape[1], "a weight matrix")
        order = order.to(weight.device)
        hessian = moments[order][:, order]
        scale = root_mean_square(hessian)[:, None]
        alive = scale.gt(0).to(scale)  # as numbers, whose products are much faster than those with a mask
        scale = scale.maximum(LEAST * scale.median())
        scale += scale.eq(0)
        hessian /= scale * scale.T
        hessian.diagonal().add_(self.damping + self.penalty)
        inverse = torch.cholesky_inverse(cholesky(hessian))

        narrow = inverse.bfloat16() if len(order) >= WIDE and fast_dtype(weight.device) == torch.bfloat16 else None
        current = weight.T[order] * scale
        keep = pattern_mask(current.abs().mul_(alive), pattern)
        moved = seen = total = current  # the weights plus their multipliers, which are 0 at first
        for step in range(self.iterations):
            if step < self.gradual:
                keep = gradual_mask(total.abs().mul_(alive), pattern, (step + 1) / self.gradual)
            # The multipliers become the part of the total that the mask removes, so that the part that it keeps minus
            # the multipliers is the total with the sign of the removed part reversed.
            kept = total * keep
            multipliers = total - kept
            kept.sub_(multipliers)
            if narrow is None or step + 1 == self.iterations:
                moved = torch.addmm(current, inverse, kept - current, alpha=self.penalty)
            else:  # what is rounded is the change since the last product, and the last one of all is exact
                moved = torch.add(moved, narrow @ (kept - seen).bfloat16(), alpha=self.penalty)
                seen = kept
            total = moved + multipliers

        pruned = torch.empty_like(weight)
        pruned[:, order] = (total * keep / scale).T
        return pruned


def pattern_mask(score: Float[Tensor, "channels rows"], pattern: Pattern) -> Bool[Tensor, "channels rows"]:
    """Return the mask that keeps the N largest scores of every M consecutive channels, in each row."""
    return pattern.mask_groups(score.unflatten(0, (-1, pattern.m)), 1).flatten(0, 1)


def gradual_mask(
    score: Float[Tensor, "channels rows"], pattern: Pattern, progress: float
) -> Bool[Tensor, "channels rows"]:
    """Return `pattern_mask` and those of the other weights whose scores are the largest in the matrix.

    The share of all weights that is pruned rises with `progress`, from 0 to 1, along a cubic curve to that of the
    pattern (Zhu & Gupta 2017, arXiv 1710.01878). In a large matrix the limit is that of evenly spaced rows.
    """
    keep = pattern_mask(score, pattern)
    step = max(1, score.numel() // SAMPLE)
    others = score[:, ::step][~keep[:, ::step]]
    pruned = round(len(others) * (1 - (1 - progress) ** 3))
    if pruned < len(others):
        limit = others.kthvalue(pruned).values if pruned else -1.0
        keep |= score > limit
    return keep


UPDATES: dict[str, type[Update]] = {method.name: method for method in (NoUpdate, SparseGPT, ADMM)}


def update(given: str | Update) -> Update:
    """Return the update of a name such as "sparsegpt:damping=0.1"; an object is returned as it is (`method_of`)."""
    return method_of(given, Update, UPDATES)  # type: ignore[type-abstract]
