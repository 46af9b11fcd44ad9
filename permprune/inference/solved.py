"""A layer's values of int4, solved: its outputs on calibration examples stay as near as they can.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and changes the columns after it, so that
they compensate for its error. Here only kept weights change: the mask stays. Coordinate descent (Nair & Suggala 2024,
arXiv 2406.17542) then moves each value to the best step beside all others, which halves the error again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from permprune.calibration.moments import inverse_factor
from permprune.kernels.product.int4 import round_to_int4, search_scale
from permprune.kernels.product.layout import BLOCK

DAMPING = 0.01
"""What is added to the diagonal of the second moments, in units of its mean."""

SWEEPS = 3
"""Passes of coordinate descent over all columns; more gain little."""


@dataclass(frozen=True)
class Solved:
    """A layer's weights in int4: `values`, fp32 (rows, channels), are steps of `scale`, bf16 (rows, blocks).

    `targets`, fp32 (rows, channels), are what was rounded to them last: the best values beside all others.
    """

    values: Tensor
    scale: Tensor
    targets: Tensor


def solve_layer(weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"]) -> Solved:
    """Return a pruned weight in int4.

    `weight` is fp32 (rows, channels), and is not changed; its zeros stay. `moments` are the second moments H of its
    inputs. The scale of a block is searched when its first column is reached, on the kept weights as they are then,
    their errors times the diagonal of H. Raises `PermpruneError` if H cannot be used.
    """
    factor = inverse_factor(moments, DAMPING)
    wanted, kept = weight.T.contiguous(), (weight != 0).T.contiguous()
    damped, columns, scales = moments.clone(), wanted.clone(), []
    damped.diagonal().add_(DAMPING * (float(moments.diagonal().mean()) or 1.0))
    for block in _blocks(len(columns)):
        scale = search_scale(columns[block].T.contiguous(), damped.diagonal()[block])
        errors = _round(columns[block], kept[block], factor[block, block], scale)
        columns[block.stop :].addcmul_(factor[block, block.stop :].T @ errors, kept[block.stop :], value=-1)
        scales.append(scale)
    gradient = damped @ (columns - wanted)  # of half the squared error of the outputs
    targets = torch.empty_like(columns)
    for _ in range(SWEEPS):
        for block, scale in zip(_blocks(len(columns)), scales, strict=True):
            before = columns[block].clone()
            _descend(columns[block], targets[block], kept[block], gradient[block].clone(), damped[block, block], scale)
            gradient.addmm_(damped[:, block], columns[block] - before)
    return Solved(columns.T.contiguous(), torch.stack(scales, 1), targets.T.contiguous())


def _blocks(channels: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, channels)) for start in range(0, channels, BLOCK)]


def _steps(column: Tensor, scale: Tensor) -> Tensor:
    """Return the steps nearest to a column, (rows,), of a block with these scales, bf16 (rows,)."""
    return round_to_int4(column.unsqueeze(-1), scale).squeeze(-1) * scale.float()


def _round(columns: Tensor, kept: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """Round a block of columns, (k, rows), in place, one after the other.

    Returns their errors, (k, rows), for which the columns after them have to compensate.
    """
    errors = torch.zeros_like(columns)
    for i, column in enumerate(columns):
        rounded = _steps(column, scale)
        torch.div(column - rounded, factor[i, i], out=errors[i])
        column.copy_(rounded)
        columns[i + 1 :].addcmul_(torch.outer(factor[i, i + 1 :], errors[i]), kept[i + 1 :], value=-1)
    return errors


def _descend(columns: Tensor, targets: Tensor, kept: Tensor, gradient: Tensor, moments: Tensor, scale: Tensor) -> None:
    """Move each column of a block, (k, rows), in place to its best steps while the others stay.

    `targets`, (k, rows), become what was rounded; `gradient`, (k, rows), is updated, and `moments` are the block's.
    """
    for i, column in enumerate(columns):
        torch.sub(column, gradient[i], alpha=1 / float(moments[i, i]), out=targets[i]).mul_(kept[i])
        best = _steps(targets[i], scale)
        gradient.addr_(moments[i], best - column)
        column.copy_(best)
