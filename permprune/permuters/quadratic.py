"""A quadratic model of the loss as a function of one problem's masks, and moves of channels that lower it.

Around the current masks, for a change dE of the pruned part E = W - W_eff of the problem's weights, the model is

    dLoss = <slope, dE> + damping / 2 * sum_r fisher_r dE_r H dE_r^T

If the covariance of the rows is known, whose diagonal is fisher, the sum is sum_rs covariance_rs dE_r H dE_s^T.

With slope = fisher * (E H) and damping 1 the model is the layer's own output error, with rows weighted by the
sensitivity of the loss. With slope = -dLoss/dW_eff it is the end-to-end model of the "newton" and "learned" searches,
in which a damping above 1 accounts for the curvature between layers that move together.

Matrices here are channels first, (channels, rows), so that a group's weights are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.kernels.search import add_placement_cost
from permprune.matching.assignment import cycles
from permprune.matching.pairs import pair_up
from permprune.pattern import Pattern
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Problem
from permprune.system.resources import Work


def model_bytes(weights: int, moments: int) -> int:
    """Return the bytes that a model of this number of weights holds while it is built.

    Four matrices are collected layer by layer and then joined; `moments` are the elements of the second moments, of
    which the model has a copy.
    """
    return 32 * weights + 4 * moments


def swap_work(channels: int, rows: int, m: int) -> Work:
    """Return the work of a `swap`: the placement cost, the gain of each pair, and the change of all slopes, once."""
    groups = channels // m
    return Work(comparisons=groups**2 * rows, products_fp32=(4 * m * channels + 2 * channels**2) * rows)


@dataclass
class Bundle:
    """The weight rows of a problem that read the same input channels.

    `weight`, `score`, `slope` and `error` are (channels, rows); `moments` is H, (channels, channels). Rows are scaled
    so that fisher is 1 in the model: weight and error are multiplied by sqrt(fisher), slope is divided by it.
    `coupling` are the covariances after this scaling, that is, the correlations (rows, rows) of each layer's rows; it
    is empty if rows are treated as independent.
    """

    weight: Tensor
    score: Tensor
    moments: Tensor
    slope: Tensor
    error: Tensor
    coupling: tuple[Tensor, ...] = ()

    def coupled(self, x: Tensor) -> Tensor:
        """Multiply `x` (..., rows) by the correlations of the rows."""
        if not self.coupling:
            return x
        parts = x.split([len(block) for block in self.coupling], -1)
        return torch.cat([part @ block for part, block in zip(parts, self.coupling, strict=True)], -1)


class QuadraticModel:
    """The model of one problem at its current groups of channels; each move updates slope and error.

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
        pieces: dict[tuple[str, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        columns: dict[tuple[str, int], Tensor] = {}
        coupling: dict[tuple[str, int], list[Tensor]] = {}
        for part in problem.parts:
            root = fisher[part.layer].clamp_min(1e-30).sqrt()[:, None]
            weight, score = (x[part.layer][:, part.columns] for x in (network.weights, network.scores))
            if order is None:
                kept = network.masks[part.layer][:, part.columns]
            else:
                kept = network.pattern_of(problem).mask_in_order(score, order)
            error = weight * ~kept * root
            slope = error if gradient is None else gradient[part.layer][:, part.columns] / -root
            place = (part.site, int(part.columns[0]))
            columns.setdefault(place, part.columns)
            pieces.setdefault(place, []).append((weight * root, score, slope, error))
            if covariance and part.layer in covariance:
                coupling.setdefault(place, []).append(covariance[part.layer] / root / root.T)
        bundles = []
        for place, rows in pieces.items():
            own = columns[place]
            moments = network.statistics.moments[place[0]][own][:, own]
            weight, score, slope, error = (torch.cat(x).T.contiguous() for x in zip(*rows, strict=True))
            slope = moments @ slope if gradient is None else slope
            blocks = tuple(coupling.get(place, ()))
            whole = sum(map(len, blocks)) == weight.shape[1]
            bundles.append(Bundle(weight, score, moments, slope, error, blocks if whole else ()))
        shown = network.orders.get(problem.name, problem.identity()) if order is None else order
        return cls(bundles, shown, network.pattern_of(problem), damping)

    @property
    def order(self) -> Tensor:
        """The current order, int64 (size,)."""
        return self.groups.flatten()

    def swap(self, generator: torch.Generator) -> None:
        """Make at most one swap for each group: each frees a random slot, and groups are paired by `placement_cost`.

        A pair is a candidate if its swap by itself lowers the model, which is computed exactly. All candidates swap
        together if that lowers the model by at least half the sum of their single gains, again computed exactly;
        otherwise the better half of them is tried, and so on. Correlated channels overshoot if all of them move.
        """
        count, m = self.groups.shape
        slots = torch.randint(m, (count,), generator=generator)
        cost = self.placement_cost(torch.arange(count), slots)
        pairs = pair_up(cost + cost.T)
        at = torch.arange(len(pairs))
        i, j = slots[pairs].T
        channels = self.groups[pairs].flatten(1)
        left, right = channels[at, i].clone(), channels[at, m + j].clone()
        channels[at, i], channels[at, m + j] = right, left
        moves = [self._move(bundle, channels) for bundle in self.bundles]
        gain = self._gain(channels, moves).cpu()
        ranked = gain.argsort()
        ranked = ranked[gain[ranked] < -1e-12]
        while len(ranked):
            chosen = ranked.sort().values
            together = [move[chosen].flatten(0, 1) for move in moves]
            if self._commit(channels[chosen].flatten(), together, float(gain[chosen].sum()) / 2):
                self.groups = self.groups.index_put((pairs[chosen],), channels[chosen].view(-1, 2, m))
                return
            ranked = ranked[: len(ranked) // 2]

    def placement_cost(self, at: Tensor, slots: Tensor) -> Tensor:
        """Return the cost of moving the channel in the free slot of each group (row) to that of each group (column).

        `at` and `slots` are int64 (k,): slot slots[i] of group at[i] is free. Returns (k, k) with zeros on the
        diagonal: the change of the model if the other members stay, without the cross terms between moving channels. As
        only one slot of a group is free, the score that a new member must exceed and the weight that it displaces are
        known exactly for every row; this is the counterfactual gradient with respect to a permutation matrix.
        """
        cost = torch.zeros(len(at), len(at), dtype=torch.float64)
        for bundle in self.bundles:
            add_placement_cost(
                cost,
                bundle.score,
                bundle.weight,
                bundle.slope,
                bundle.error,
                curvature=self.damping / 2 * bundle.moments.diagonal(),
                groups=self.groups[at],
                slots=slots,
                pattern=self.pattern,
            )
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
        ranked = total.argsort()
        ranked = ranked[total[ranked] < -1e-12]
        while len(ranked):
            moving = torch.isin(cycle, ranked).nonzero().flatten()
            if self._try((at[moving], slots[moving]), (at[target[moving]], slots[target[moving]])):
                return
            ranked = ranked[: len(ranked) // 2]

    def _try(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> bool:
        """Move channels from their (group, slot) to another if this lowers the model; returns whether it did."""
        groups = self.groups.clone()
        groups[target] = self.groups[source]
        to = target[0]
        channels = groups[to].view(1, -1)
        moves = [self._move(bundle, channels)[0] for bundle in self.bundles]
        if not self._commit(channels.flatten(), moves, -1e-12):
            return False
        self.groups = groups
        return True

    def _move(self, bundle: Bundle, channels: Tensor) -> Tensor:
        """Return dE (sets, k, rows) of placing the channels (sets, k) in groups of m in the given order."""
        flat = channels.flatten()
        keep = self.pattern.mask_groups(bundle.score[flat].view(-1, self.pattern.m, bundle.score.shape[1]), dim=1)
        after = bundle.weight[flat].mul_(keep.logical_not_().flatten(0, 1))
        return after.sub_(bundle.error[flat]).view(*channels.shape, -1)

    def _gain(self, channels: Tensor, moves: list[Tensor]) -> Tensor:
        """Return the predicted change of the loss by each set's move, over all bundles: (sets,)."""
        parts = [self._predict(bundle, channels, move) for bundle, move in zip(self.bundles, moves, strict=True)]
        return torch.stack(parts).sum(0)

    def _predict(self, bundle: Bundle, channels: Tensor, move: Tensor) -> Tensor:
        """Return the predicted change of the loss by each set's move, in one bundle: (sets,)."""
        block = bundle.moments[channels[:, :, None], channels[:, None, :]]
        field = bundle.coupled(torch.bmm(block, move)).mul_(self.damping / 2)
        field += bundle.slope[channels.flatten()].view_as(move)
        return field.mul_(move).sum((1, 2))

    def _commit(self, channels: Tensor, moves: list[Tensor], enough: float) -> bool:
        """Make these moves if together they change the model by at most `enough`; returns whether they were made."""
        fields = [
            self.damping * bundle.coupled(bundle.moments[:, channels] @ move)
            for bundle, move in zip(self.bundles, moves, strict=True)
        ]
        change = 0.0
        for bundle, move, field in zip(self.bundles, moves, fields, strict=True):
            change += float(((bundle.slope[channels] + field[channels] / 2) * move).sum())
        if change > enough:
            return False
        self.change += change
        for bundle, move, field in zip(self.bundles, moves, fields, strict=True):
            bundle.error[channels] += move
            bundle.slope += field
        return True
