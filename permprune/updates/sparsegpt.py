"""SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.pattern import Pattern
from permprune.updates.base import LayerUpdate

ATTEMPTS = 4
"""Dampings tried, each ten times the one before."""


@dataclass(frozen=True)
class SparseGPT(LayerUpdate):
    """Optimal Brain Surgeon, column by column (Frantar & Alistarh 2023, arXiv 2301.00774, section 3).

    The sweep meets the columns in stored order. At each group it keeps the weights of a row that cost the most to
    lose, w^2 / [(H_F)^-1]_jj, F being the columns from j on; the error of each weight it prunes is made up for by the
    columns not yet met. `damping` is added to the diagonal of H, in units of its mean. `block` columns at a time, or
    the most whole groups in as many, are finished before the columns behind them are touched.
    A channel that is always zero is pruned before any other.
    """

    name: ClassVar[str] = "sparsegpt"
    damping: float = 0.01
    block: int = 128

    def apply(self, weight: Tensor, moments: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
        pattern.require_divisible(weight.shape[1], "a weight matrix")
        order = order.to(weight.device)
        factor = self._factor(moments[order][:, order])
        columns = weight.T[order].contiguous()  # a row of memory for each column
        width = max(1, self.block // pattern.m) * pattern.m
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            errors = _sweep(columns[start:stop], factor[start:stop, start:stop], pattern)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        pruned = torch.empty_like(weight)
        pruned[:, order] = columns.T
        return pruned

    def _factor(self, moments: Tensor) -> Tensor:
        """The upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1; U_jj^2 = [(H_F)^-1]_jj.

        Read from the last channel to the first, a Cholesky factor of H is an upper one, whose inverse is U. Where a
        channel is always zero U_jj is infinite.
        """
        mean = float(moments.diagonal().mean()) or 1.0
        for attempt in range(ATTEMPTS):
            damped = moments.flip(0, 1)
            damped.diagonal().add_(self.damping * 10**attempt * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
                factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                if torch.isfinite(factor).all() and factor.diagonal().all():
                    factor.diagonal().masked_fill_(moments.diagonal() == 0, torch.inf)  # nothing is lost there
                    return factor
        raise PermpruneError(
            "the second moments of its inputs have no Cholesky factor even with more damping: "
            "calibrate with --precision fp32, and check the calibration text"
        )


def _sweep(columns: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Prune (k, rows) columns in place, group by group; returns what each owes to those behind it, (k, rows)."""
    errors = torch.zeros_like(columns)
    scale = factor.diagonal()[:, None]
    for start in range(0, len(columns), pattern.m):
        stop = start + pattern.m
        group = columns[start:stop]
        keep = pattern.mask_groups(group.abs() / scale[start:stop], 0)
        for i in range(pattern.m):
            own, dropped = start + i, ~keep[i]
            torch.mul(group[i] / scale[own], dropped, out=errors[own])
            group[i].masked_fill_(dropped, 0)
            group[i + 1 :].addr_(factor[own, own + 1 : stop], errors[own], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors
