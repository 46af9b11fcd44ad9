"""The SparseGPT update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permprune.options import Count, NonNegative
from permprune.pattern import Pattern
from permprune.system.imports import on_first_use
from permprune.updates.base import LayerUpdate

with on_first_use(globals()):
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from permprune.calibration.moments import inverse_factor


@dataclass(frozen=True)
class SparseGPT(LayerUpdate):
    """Optimal Brain Surgeon, column by column (Frantar & Alistarh 2023, arXiv 2301.00774, section 3).

    The columns are processed in stored order. In each group of a row the weights with the largest w^2 / [(H_F)^-1]_jj
    are kept, where F are the columns from j on, unless a mask is given. The columns that are not yet processed are
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
        mask: Bool[Tensor, "rows channels"] | None = None,
    ) -> Float[Tensor, "rows channels"]:
        pattern.require_divisible(weight.shape[1], "a weight matrix")
        order = order.to(weight.device)
        factor = inverse_factor(moments[order][:, order], self.damping)
        factor.diagonal().masked_fill_(moments.diagonal()[order] == 0, torch.inf)  # pruning these costs nothing
        columns = weight.T[order].contiguous()  # each column is contiguous in memory
        keep = None if mask is None else mask.T[order]
        width = max(1, self.block // pattern.m) * pattern.m
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            kept = None if keep is None else keep[start:stop]
            errors = _sweep(columns[start:stop], factor[start:stop, start:stop], pattern, kept)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        pruned = torch.empty_like(weight)
        pruned[:, order] = columns.T
        return pruned


def _sweep(columns: Tensor, factor: Tensor, pattern: Pattern, mask: Tensor | None) -> Tensor:
    """Prune (k, rows) columns in place, group by group.

    Returns the errors of the columns, (k, rows), for which the columns after them have to compensate.
    """
    errors = torch.zeros_like(columns)
    scale = factor.diagonal()[:, None]
    for start in range(0, len(columns), pattern.m):
        stop = start + pattern.m
        group = columns[start:stop]
        keep = pattern.mask_groups(group.abs() / scale[start:stop], 0) if mask is None else mask[start:stop]
        for i in range(pattern.m):
            column, dropped = start + i, ~keep[i]
            torch.mul(group[i] / scale[column], dropped, out=errors[column])
            group[i].masked_fill_(dropped, 0)
            group[i + 1 :].addr_(factor[column, column + 1 : stop], errors[column], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors
