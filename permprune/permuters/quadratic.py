"""A quadratic model of the loss as a function of one problem's masks, and moves of channels that lower it.

Around the current masks, for a change dE of the pruned part E = W - W_eff of the problem's weights, the model is

    dLoss = <slope, dE> + damping / 2 * sum_r fisher_r dE_r H dE_r^T

If the covariance of the rows is known, whose diagonal is fisher, the sum is sum_rs covariance_rs dE_r H dE_s^T.

With slope = fisher * (E H) and damping 1 the model is the layer's own output error, with rows weighted by the
sensitivity of the loss. With slope = -dLoss/dW_eff it is the end-to-end model of the "newton" and "learned" searches,
in which a damping above 1 accounts for the curvature between layers that move together.

The model is a sum over rows, of which it reads a block at a time. Of all rows it holds only the slope, in the type of
the weights; E follows from the weights, their scores and the groups.

Matrices here are channels first, (channels, rows), so that a group's weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from permprune.kernels.search import add_placement_cost, pruned_part
from permprune.matching.assignment import cycles
from permprune.matching.pairs import pair_up
from permprune.pattern import Pattern
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.outline import Outline
from permprune.pruning.problem import Part, Problem
from permprune.system.resources import Work

BLOCK = 2**21
"""Number of weights that are read at a time: a matrix of them is 8 MiB in fp32. Smaller problems are read once."""


def model_bytes(outline: Outline, threads: int, slopes: torch.dtype) -> int:
    """Return the bytes that the models of the largest problems hold, one on each thread.

    These are the slopes, of type `slopes`, and of a block of rows the weights and scores (of a small problem, those of
    all rows), the pruned parts before and after a step, their difference, and two matrices that are computed from it;
    and the second moments that one layer reads, with a part of them in another order.
    """
    total, largest = 0, max(layer.weight.numel() for layer in outline.layers)
    for problem in outline.largest(threads):
        weights = problem.size * outline.rows_of(problem)
        block = min(weights, largest, BLOCK)
        total += slopes.itemsize * weights + 20 * block + 8 * (weights if weights <= BLOCK else block)
        total += 6 * max(outline.widths[part.site] for part in problem.parts) ** 2
    return total


def swap_work(channels: int, rows: int, m: int) -> Work:
    """Return the work of a `swap`: the placement cost, the gain of each pair, and the change of all slopes, once."""
    groups = channels // m
    return Work(comparisons=groups**2 * rows, products_fp32=(4 * m * channels + 2 * channels**2) * rows)


@dataclass
class Rows:
    """Rows of a problem that read the same input channels: those of one layer.

    `read` yields (weight, score), both (channels, rows), for one block of rows after the other, and `slopes` are the
    slopes of the blocks. Rows are scaled so that fisher is 1 in the model: the weight is multiplied by sqrt(fisher),
    the slope is divided by it. `coupling` is the covariance after this scaling, that is, the correlations (rows, rows),
    for which all rows have to be in one block; None if rows are treated as independent.
    """

    read: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    slopes: list[Tensor]
    coupling: Tensor | None = None

    def coupled(self, x: Tensor) -> Tensor:
        """Multiply `x` (..., rows) by the correlations of the rows."""
        return x if self.coupling is None else x @ self.coupling


@dataclass
class Bundle:
    """Rows that read the same input channels.

    `moments` returns H, (channels, channels), and `diagonal` is its diagonal.
    """

    moments: Callable[[], Tensor]
    diagonal: Tensor
    rows: list[Rows]


@dataclass(frozen=True)
class Block:
    """The matrices of a block of rows, (channels, rows), at the current groups; `slope` may be changed in place."""

    weight: Tensor
    score: Tensor
    slope: Tensor
    error: Tensor
    coupled: Callable[[Tensor], Tensor]


class QuadraticModel:
    """The model of one problem at its current groups of channels; each move updates the slopes.

    `change` is the sum of the predicted changes of the loss of all moves made.
    """

    def __init__(self, bundles: list[Bundle], order: Tensor, pattern: Pattern, damping: float) -> None:
        self.bundles, self.pattern, self.damping = bundles, pattern, damping
        self.groups = order.view(-1, pattern.m).clone()
        self.change = 0.0

    @classmethod
    def of(
        cls,
        network: MaskedLayers,
        problem: Problem,
        fisher: dict[str, Tensor],
        gradient: dict[str, Tensor] | None = None,
        damping: float = 1.0,
        order: Tensor | None = None,
        covariance: dict[str, Tensor] | None = None,
    ) -> QuadraticModel:
        """Build the model at the masks of `order`, by default the network's current order.

        `fisher`, `gradient` and `covariance` are by layer, as in `Gradients`. Without `gradient` it is the local model,
        whose slope is fisher * (E H). If any layer of a bundle has no `covariance`, the bundle's rows are treated as
        independent.
        """
        places: dict[tuple[str, int], list[Part]] = {}
        for part in problem.parts:
            places.setdefault((part.site, int(part.columns[0])), []).append(part)
        small = problem.size * sum(network.row_count(part.layer) for part in problem.parts) <= BLOCK
        bundles = []
        for parts in places.values():
            known = covariance or {}
            coupled = all(part.layer in known for part in parts)
            rows = [
                _rows(
                    network,
                    part,
                    fisher[part.layer],
                    gradient=None if gradient is None else gradient[part.layer],
                    covariance=known[part.layer] if coupled else None,
                    small=small,
                )
                for part in parts
            ]
            moments = partial(_block_of, network.statistics.moments, parts[0])
            bundles.append(Bundle(moments, moments().diagonal().clone(), rows))
        shown = network.orders.get(problem.name, problem.identity()) if order is None else order
        model = cls(bundles, shown, network.pattern_of(problem), damping)
        if gradient is None:
            model._set_local_slopes()
        return model

    @property
    def order(self) -> Tensor:
        """The current order, int64 (size,)."""
        return self.groups.flatten()

    def swap(self, generator: torch.Generator, times: int = 1) -> None:
        """Make at most `times` swaps for each group, one after the other.

        Each time every group frees a random slot, and groups are paired by `placement_cost`. A pair is a candidate if
        its swap by itself lowers the model, which is computed exactly. All candidates swap together if that lowers the
        model by at least half the sum of their single gains, again computed exactly; otherwise the better half of them
        is tried, and so on. Correlated channels overshoot if all of them move.
        """
        if not times:
            return
        count, m = self.groups.shape
        slots = torch.randint(m, (count,), generator=generator)
        cost = self.placement_cost(torch.arange(count), slots)
        for left in reversed(range(times)):
            pairs = pair_up(cost + cost.T)
            at = torch.arange(len(pairs))
            i, j = slots[pairs].T
            channels = self.groups[pairs].flatten(1)
            first, second = channels[at, i].clone(), channels[at, m + j].clone()
            channels[at, i], channels[at, m + j] = second, first
            swapped = channels.view(-1, 2, m)
            gain = self._gains(self.groups.index_put((pairs,), swapped), channels)
            ranked = gain.argsort()
            candidates = [
                (self.groups.index_put((pairs[chosen],), swapped[chosen]), float(gain[chosen].sum()) / 2)
                for chosen in _better_halves(ranked[gain[ranked] < -1e-12])
            ]
            slots = torch.randint(m, (count,), generator=generator) if left else slots[:0]
            cost = self._take_first(candidates, slots)

    def placement_cost(self, at: Tensor, slots: Tensor) -> Tensor:
        """Return the cost of moving the channel in the free slot of each group (row) to that of each group (column).

        `at` and `slots` are int64 (k,): slot slots[i] of group at[i] is free. Returns (k, k) with zeros on the
        diagonal: the change of the model if the other members stay, without the cross terms between moving channels. As
        only one slot of a group is free, the score that a new member must exceed and the weight that it displaces are
        known exactly for every row; this is the counterfactual gradient with respect to a permutation matrix.
        """
        cost = torch.zeros(len(at), len(at), dtype=torch.float64)
        for bundle in self.bundles:
            for block in self._blocks(bundle):
                self._add_cost(cost, bundle, block, block.error, self.groups[at], slots)
        return (cost - cost.diagonal()[:, None]).float()

    def move(self, at: Tensor, slots: Tensor, target: Tensor, cost: Tensor) -> None:
        """Move the free channel of each group at[i] to group at[target[i]], as far as this lowers the model.

        The cycles of `target` can be moved independently of each other. Those whose total `cost` is negative are tried
        together, with the exact change of the model; if it does not fall, the better half of them is tried, then the
        better quarter, and so on.
        """
        gain = cost[torch.arange(len(at)), target]
        cycle = cycles(target)
        total = gain.new_zeros(len(at)).index_add_(0, cycle, gain)
        ranked, candidates = total.argsort(), []
        for chosen in _better_halves(ranked[total[ranked] < -1e-12]):
            moving = torch.isin(cycle, chosen).nonzero().flatten()
            groups, to = self.groups.clone(), target[moving]
            groups[at[to], slots[to]] = self.groups[at[moving], slots[moving]]
            candidates.append((groups, -1e-12))
        self._take_first(candidates, slots[:0])

    def _take_first(self, candidates: list[tuple[Tensor, float]], slots: Tensor) -> Tensor:
        """Move to the first of the candidates (groups, enough) that changes the model by at most `enough`, if any.

        Most often the first one is taken. The change of the model follows from the slopes at the end of the step, so
        the model moves to each candidate, and moves on from there. Returns the placement cost at the new groups with
        these slots free, if there are any.
        """
        start, before = self.groups, self.change
        for groups, enough in candidates:
            cost = self._shift(groups, slots)
            if self.change - before <= enough:
                return cost
        cost = self._shift(start, slots)
        self.change = before
        return cost

    def _blocks(self, bundle: Bundle) -> Iterator[Block]:
        for rows in bundle.rows:
            for (weight, score), slope in zip(rows.read(), rows.slopes, strict=True):
                error = pruned_part(weight, score, self.groups, self.pattern)
                yield Block(weight, score, slope, error, rows.coupled)

    def _gains(self, groups: Tensor, channels: Tensor) -> Tensor:
        """Return the change of the model by each set's move to its places in `groups`, alone: fp64 (sets,).

        `channels`, int64 (sets, k), are those of the groups that a set changes; no group is changed by two sets.
        """
        gain = torch.zeros(len(channels), dtype=torch.float64)
        for bundle in self.bundles:
            among = bundle.moments()[channels[:, :, None], channels[:, None, :]]
            for block in self._blocks(bundle):
                move = pruned_part(block.weight, block.score, groups, self.pattern).sub_(block.error)
                own = move[channels.flatten()].view(*channels.shape, -1)
                products = torch.bmm(block.coupled(own), own.mT).mul_(among).sum((1, 2))
                linear = move.mul_(block.slope).sum(1)[channels].sum(1)
                gain += linear.add_(products, alpha=self.damping / 2).cpu()
        return gain

    def _shift(self, groups: Tensor, slots: Tensor) -> Tensor:
        """Move to other groups: update the slopes and `change`; returns the placement cost there as `_take_first`."""
        channels = groups[(groups != self.groups).any(1)].flatten()
        cost = torch.zeros(len(slots), len(slots), dtype=torch.float64)
        if not len(channels):
            return self.placement_cost(torch.arange(len(slots)), slots) if len(slots) else cost
        for bundle in self.bundles:
            few = 2 * len(channels) < groups.numel()
            moments = bundle.moments()[channels].T if few else bundle.moments()
            for block in self._blocks(bundle):
                error = pruned_part(block.weight, block.score, groups, self.pattern)
                move = error - block.error
                field = block.coupled(moments @ (move[channels] if few else move)).mul_(self.damping)
                block.slope.add_(field)
                self.change += float((move * block.slope).sum() - field.mul_(move).sum() / 2)
                if len(slots):
                    self._add_cost(cost, bundle, block, error, groups, slots)
        self.groups = groups
        return (cost - cost.diagonal()[:, None]).float()

    def _add_cost(
        self, cost: Tensor, bundle: Bundle, block: Block, error: Tensor, groups: Tensor, slots: Tensor
    ) -> None:
        add_placement_cost(
            cost,
            block.score,
            block.weight,
            block.slope.to(block.weight.dtype),
            error,
            curvature=self.damping / 2 * bundle.diagonal,
            groups=groups,
            slots=slots,
            pattern=self.pattern,
        )

    def _set_local_slopes(self) -> None:
        """Set the slopes to those of the local model, H E."""
        for bundle in self.bundles:
            moments = bundle.moments()
            for rows in bundle.rows:
                for weight, score in rows.read():
                    rows.slopes.append(moments @ pruned_part(weight, score, self.groups, self.pattern))


def _better_halves(ranked: Tensor) -> Iterator[Tensor]:
    """Yield all of `ranked`, its first half, its first quarter and so on, each sorted in ascending order."""
    while len(ranked):
        yield ranked.sort().values
        ranked = ranked[: len(ranked) // 2]


def _block_of(moments: Mapping[str, Tensor], part: Part) -> Tensor:
    return moments[part.site][part.span][:, part.span]


def _rows(
    network: MaskedLayers,
    part: Part,
    fisher: Tensor,
    *,
    gradient: Tensor | None,
    covariance: Tensor | None,
    small: bool,
) -> Rows:
    """The rows of a layer at a part's columns; without `gradient` they have no slopes yet.

    The blocks of a `small` problem are read once.
    """
    root = fisher.clamp_min(1e-30).sqrt()
    size = len(root) if covariance is not None else max(1, BLOCK // len(part.columns))
    spans = [slice(first, first + size) for first in range(0, len(root), size)]

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for span, (weight, score) in zip(spans, network.blocks(part, spans), strict=True):
            yield weight.mul_(root[span]), score

    held = list(read()) if small else None

    slopes = []
    if gradient is not None:
        own = gradient[:, part.span]
        slopes = [(own[span].float() / -root[span, None]).T.contiguous().to(own.dtype) for span in spans]
    return Rows(
        read if held is None else partial(iter, held),
        slopes,
        None if covariance is None else covariance / root[:, None] / root,
    )
