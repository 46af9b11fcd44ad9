"""Entropic matching: the doubly stochastic matrix of least cost, by Sinkhorn iterations in the log domain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.matching.assignment import require_costs

Potentials = tuple[Tensor, Tensor]
"""(f, g), each (..., n), in the unit of the costs."""


@dataclass(frozen=True)
class Plan:
    """What the iterations reached.

    `matrix` (..., n, n) carries the graph. Detached are `row_error` and `column_error` (...), the largest
    distance of a row or column sum of the matrix from 1, and `potentials`, the f and g to start a similar
    problem from.
    """

    matrix: Tensor
    row_error: Tensor
    column_error: Tensor
    iterations: int
    potentials: Potentials
    tolerance: float | None

    @property
    def converged(self) -> bool | None:
        """Whether every sum came within the tolerance; None where none was given."""
        if self.tolerance is None:
            return None
        return bool((torch.maximum(self.row_error, self.column_error) <= self.tolerance).all())


def sinkhorn(
    cost: Tensor,
    epsilon: float,
    iterations: int = 50,
    tolerance: float | None = None,
    potentials: Potentials | None = None,
) -> Plan:
    """Minimise <C, P> + epsilon * sum P (log P - 1) over the doubly stochastic P.

    The minimiser is P = exp((f_i + g_j - C_ij) / epsilon); f and g are fitted in turn to the row and column
    sums (Li et al. 2026, arXiv 2601.22980; Mena et al. 2018, arXiv 1802.08665). P nears a permutation as
    epsilon goes to 0.

    `cost` is (..., n, n), each leading index a problem of its own; types narrower than fp32 are computed in
    fp32. At most `iterations` are made, fewer when every row and column sum of every problem is within
    `tolerance` of 1 (fp32 resolves some 1e-7 * max |C| / epsilon). `potentials` starts from those of an
    earlier plan, whatever its epsilon. Autograd goes through the iterations. Raises `PermpruneError` when the
    matrices are not square, a cost is not finite, or an argument is out of range.
    """
    require_costs(cost)
    _require_settings(epsilon, iterations, tolerance)
    kernel = cost.to(torch.promote_types(cost.dtype, torch.float32)) / -epsilon
    f, g = _start(kernel, epsilon, potentials)
    done = 0
    while done < iterations:
        rows = torch.logsumexp(kernel + g[..., None, :], -1)
        if done and tolerance is not None and _within(f + rows, tolerance):
            break
        f = -rows
        g = -torch.logsumexp(kernel + f[..., :, None], -2)
        done += 1
    matrix = (kernel + f[..., :, None] + g[..., None, :]).exp()
    row_error, column_error = ((matrix.detach().sum(dim) - 1).abs().amax(-1) for dim in (-1, -2))
    return Plan(matrix, row_error, column_error, done, (f.detach() * epsilon, g.detach() * epsilon), tolerance)


def _require_settings(epsilon: float, iterations: int, tolerance: float | None) -> None:
    if not 0 < epsilon < math.inf:
        raise PermpruneError(f"epsilon is {epsilon}: give a positive number")
    if iterations < 1:
        raise PermpruneError(f"{iterations} Sinkhorn iterations match nothing: give at least 1")
    if tolerance is not None and not tolerance > 0:
        raise PermpruneError(f"the Sinkhorn tolerance is {tolerance}: give a positive number, or None")


def _start(kernel: Tensor, epsilon: float, potentials: Potentials | None) -> Potentials:
    """Potentials over epsilon to start from."""
    if potentials is None:
        return torch.zeros_like(kernel[..., 0]), torch.zeros_like(kernel[..., 0])
    if any(potential.shape != kernel.shape[:-1] for potential in potentials):
        shapes = " and ".join(str(tuple(potential.shape)) for potential in potentials)
        raise PermpruneError(f"potentials of shape {shapes} do not fit costs of shape {tuple(kernel.shape)}")
    f, g = (potential.to(kernel) / epsilon for potential in potentials)
    return f, g


def _within(log_sums: Tensor, tolerance: float) -> bool:
    """Whether all sums, given by their logarithms, are within `tolerance` of 1."""
    return bool((log_sums.detach().expm1().abs() <= tolerance).all())
