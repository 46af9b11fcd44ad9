"""A layer's values of int4, solved: its outputs on calibration examples stay as near as they can.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and changes the columns after it, so that
they compensate for its error. Here only kept weights change: the mask stays. Coordinate descent (Nair & Suggala 2024,
arXiv 2406.17542) then moves each value to the best step beside all others, which halves the error again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from permprune.calibration.moments import inverse_factor
from permprune.kernels.product.int4 import GROUP, nearest_steps, round_to, search_exponent, search_part, stored_values
from permprune.kernels.product.layout import BLOCK, PART

DAMPING = 0.01
"""What is added to the diagonal of the second moments, in units of its mean."""

SWEEPS = 3
"""Passes of coordinate descent over all columns; more gain little."""

INSIDE = 0.999
"""How far targets may be from their values, relative to the distance at which others are as near."""


@dataclass(frozen=True)
class Solved:
    """A layer's weights in int4: `values`, fp32 (rows, channels), are steps of `scale`, bf16 (rows, parts).

    `targets`, fp32 (rows, channels), are what was rounded to them last: the best values beside all others. `paired` is
    whether the pattern is 2:4.
    """

    values: Tensor
    scale: Tensor
    targets: Tensor
    paired: bool

    def stored(self, weight: Tensor) -> Tensor:
        """Return the values, fp32 (rows, channels), that are stored for other weights with these scales."""
        return stored_values(weight, self.scale, paired=self.paired)


def solve_layer(
    weight: Float[Tensor, "rows channels"], moments: Float[Tensor, "channels channels"], *, paired: bool
) -> Solved:
    """Return a pruned weight in int4.

    `weight` is fp32 (rows, channels), and is not changed; its zeros stay. `moments` are the second moments H of its
    inputs, and `paired` is whether the pattern is 2:4. Scales are searched when the first column of a block, and of a
    part of it, is reached, on the kept weights as they are then, their errors times the diagonal of H. Raises
    `PermpruneError` if H cannot be used.
    """
    factor = inverse_factor(moments, DAMPING)
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * (float(moments.diagonal().mean()) or 1.0))
    channels, padding = len(moments), -weight.shape[1] % BLOCK
    wanted, kept = weight.T.contiguous(), (weight != 0).T.contiguous()
    solver = _Solver(wanted.clone(), kept, F.pad(damped.diagonal(), (0, padding)), paired)
    for part in _parts(channels):
        errors = solver.round(part, factor[part, part])
        solver.columns[part.stop :].addcmul_(factor[part, part.stop :].T @ errors, kept[part.stop :], value=-1)
    gradient = damped @ (solver.columns - wanted)  # of half the squared error of the outputs
    for _ in range(SWEEPS):
        for part in _parts(channels):
            before = solver.columns[part].clone()
            solver.descend(part, gradient[part].clone(), damped[part, part])
            gradient.addmm_(damped[:, part], solver.columns[part] - before)
    return solver.solved()


def _parts(channels: int) -> list[slice]:
    return [slice(start, min(start + PART, channels)) for start in range(0, channels, PART)]


class _Solver:
    """The columns of a layer, (channels, rows), while they are made steps of scales that are found on the way.

    `kept` are those that are not pruned, and `importance`, (channels in whole blocks,), weighs their errors.
    """

    def __init__(self, columns: Tensor, kept: Tensor, importance: Tensor, paired: bool) -> None:
        self.columns, self.kept, self.importance, self.paired = columns, kept, importance, paired
        self.targets, self.odd = torch.zeros_like(columns), torch.zeros_like(columns)
        self.exponents: list[Tensor] = []  # of blocks
        self.scales: list[Tensor] = []  # of parts

    def round(self, part: slice, factor: Tensor) -> Tensor:
        """Round the columns of a part, one after the other; returns their errors, (k, rows).

        For these the columns after them have to compensate. `factor` is the part's own of the inverse moments.
        """
        self._search(part)
        columns, kept = self.columns[part], self.kept[part]
        errors = torch.zeros_like(columns)
        for i, column in enumerate(columns):
            if self.paired and i % GROUP == 0:
                self._choose(slice(part.start + i, part.start + i + GROUP), columns[i : i + GROUP])
            rounded = self._nearest(part.start + i, column)
            torch.div(column - rounded, factor[i, i], out=errors[i])
            column.copy_(rounded)
            columns[i + 1 :].addcmul_(torch.outer(factor[i, i + 1 :], errors[i]), kept[i + 1 :], value=-1)
        return errors

    def descend(self, part: slice, gradient: Tensor, moments: Tensor) -> None:
        """Move each column of a part to its best steps while the others stay.

        `gradient`, (k, rows), is updated; `moments` are the part's.
        """
        columns, kept, diagonal = self.columns[part], self.kept[part], moments.diagonal().tolist()
        for i, column in enumerate(columns):
            if self.paired and i % GROUP == 0:
                self._turn(slice(part.start + i, part.start + i + GROUP), gradient, moments, i)
            target = self.targets[part.start + i]
            torch.sub(column, gradient[i], alpha=1 / diagonal[i], out=target).mul_(kept[i])
            best = self._nearest(part.start + i, target)
            gradient.addr_(moments[i], best - column)
            column.copy_(best)

    def solved(self) -> Solved:
        """Return the result, with targets from which rounding leads to the same values."""
        scales = [*self.scales, *self.scales[-1:] * (-len(self.scales) % (BLOCK // PART))]
        scale = torch.stack(scales, 1).bfloat16()
        values, targets = self.columns.T.contiguous(), self.targets.T.contiguous()
        if self.paired:
            apart = (targets - values).unflatten(1, (-1, GROUP))
            steps = torch.stack(self.scales, 1).repeat_interleave(PART, 1)[:, : values.shape[1] : GROUP]
            far = apart.abs().sum(-1) / steps  # of two lattices, the other one is as near at a distance of one step
            targets = values + (apart * (INSIDE / far.clamp_min(INSIDE)).unsqueeze(-1)).flatten(1)
        return Solved(values, scale, targets, self.paired)

    def _search(self, part: slice) -> None:
        """Find the scales of a part, and with the first of a block the exponents of all."""
        if part.start % BLOCK == 0:
            self.exponents.append(search_exponent(*self._shown(part.start, BLOCK), paired=self.paired))
        weights, importance = self._shown(part.start, PART)
        scale = search_part(weights[:, 0], self.exponents[-1], importance[0], paired=self.paired)[0]
        self.scales.append(scale.float())

    def _shown(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Some columns as weights, (rows, parts, 16), and the importance of their errors."""
        columns = self.columns[start : start + count]
        weights = F.pad(columns.T, (0, count - len(columns))).unflatten(1, (-1, PART))
        return weights, self.importance[start : start + count].unflatten(0, (-1, PART))

    def _choose(self, group: slice, columns: Tensor) -> None:
        """Choose the lattice of a group, the columns of which are these, by the errors of rounding."""
        scale, importance = self.scales[group.start // PART], self.importance[group]
        steps = nearest_steps(columns.T, scale, paired=True, importance=importance)
        self.odd[group] = (steps.T % 2).amax(0) * self.kept[group]

    def _turn(self, group: slice, gradient: Tensor, moments: Tensor, first: int) -> None:
        """Move the columns of a group to the nearest steps of the other lattice where that lowers the error.

        The change of half the squared error is exact, unlike that of `_choose`.
        """
        own, kept = slice(first, first + GROUP), self.kept[group]
        here, scale, square = self.columns[group], self.scales[group.start // PART], moments[own, own]
        best = (here - gradient[own] / square.diagonal().unsqueeze(1)).mul_(kept)
        other = (1 - self.odd[group]) * kept
        moved = (round_to(best / scale, other) * scale).mul_(kept) - here
        change = (moved * (gradient[own] + square @ moved / 2)).sum(0)
        turned = (change < 0) & (kept.sum(0) == GROUP // 2)
        self.odd[group] = torch.where(turned, other, self.odd[group])
        moved *= turned
        here += moved
        gradient.addmm_(moments[:, own], moved)

    def _nearest(self, channel: int, column: Tensor) -> Tensor:
        """The values nearest to those of a column of its lattice."""
        scale = self.scales[channel // PART]
        if self.paired:
            return round_to(column / scale, self.odd[channel]).mul_(scale).mul_(self.kept[channel])
        return nearest_steps(column.unsqueeze(1), scale, paired=False).squeeze(1).mul_(scale)
