"""A quadratic model of the loss in the masks of one problem, and the moves of channels that lower it.

The model, around the present masks, for a change dE of the pruned part E = W - W_eff of the problem's weights:

    dLoss = <slope, dE> + damping / 2 * sum_r fisher_r dE_r H dE_r^T

where a covariance of the rows, whose diagonal is fisher, may stand for it: sum_rs covariance_rs dE_r H dE_s^T.

With slope = fisher * (E H) and damping 1 it is the layer's own output error, rows weighted by how much the loss feels
them; with slope = -dLoss/dW_eff it is the end-to-end model of the "newton" and "learned" searches, where a damping
above 1 stands for the curvature between layers that move together.

Matrices here are channels first, (channels, rows), so that a group's weights are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.matching.assignment import cycles
from permprune.matching.pairs import pair_up
from permprune.pattern import Pattern, ranks
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Problem

BLOCK = 2**18
"""Elements of a matrix that are worked on at a time."""


@dataclass
class Bundle:
    """Rows that share one input. `weight`, `score`, `slope` and `error` are (channels, rows), `moments` is H.

    Rows are scaled so that fisher is 1 in the model: weight and error times sqrt(fisher), slope over sqrt(fisher).
    `coupling` are what is left of the covariances, by layer, correlations (rows, rows); none where rows are apart.
    """

    weight: Tensor
    score: Tensor
    moments: Tensor
    slope: Tensor
    error: Tensor
    coupling: tuple[Tensor, ...] = ()

    def coupled(self, x: Tensor) -> Tensor:
        """`x` (..., rows) times the correlations of the rows."""
        if not self.coupling:
            return x
        parts = x.split([len(block) for block in self.coupling], -1)
        return torch.cat([part @ block for part, block in zip(parts, self.coupling, strict=True)], -1)


class QuadraticModel:
    """The model of one problem at its present groups; moves of channels keep slope and error up to date.

    `change` adds up the modelled changes of all moves made.
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
        """The model at the masks of `order`, or of the order that the network shows.

        Without `gradient` it is the local one, whose slope is fisher * (E H). `covariance` is that of the rows of
        layers; rows are apart in a bundle with a layer that has none.
        """
        if order is None:
            order = network.orders.get(problem.name, problem.identity())
        pieces: dict[tuple[str, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        coupling: dict[tuple[str, int], list[Tensor]] = {}
        for part in problem.parts:
            root = fisher[part.layer].clamp_min(1e-30).sqrt()[:, None]
            weight, score = (x[part.layer][:, part.columns] for x in (network.weights, network.scores))
            error = weight * ~network.pattern_of(problem).mask_in_order(score, order) * root
            slope = error if gradient is None else gradient[part.layer][:, part.columns] / -root
            place = (part.site, int(part.columns[0]))
            pieces.setdefault(place, []).append((weight * root, score, slope, error))
            if covariance and part.layer in covariance:
                coupling.setdefault(place, []).append(covariance[part.layer] / root / root.T)
        bundles = []
        for (site, first), rows in pieces.items():
            columns = next(p.columns for p in problem.parts if (p.site, int(p.columns[0])) == (site, first))
            moments = network.statistics.moments[site][columns][:, columns]
            weight, score, slope, error = (torch.cat(x).T.contiguous() for x in zip(*rows, strict=True))
            slope = moments @ slope if gradient is None else slope
            blocks = tuple(coupling.get((site, first), ()))
            whole = sum(map(len, blocks)) == weight.shape[1]
            bundles.append(Bundle(weight, score, moments, slope, error, blocks if whole else ()))
        return cls(bundles, order, network.pattern_of(problem), damping)

    @property
    def order(self) -> Tensor:
        return self.groups.flatten()

    def swap(self, generator: torch.Generator) -> None:
        """One swap for every group: each frees a random slot, and the pairs that gain most by `placement_cost` form.

        A pair may swap if the model says, exactly, that it gains by itself. Those that may swap together if the model
        says, exactly, that at least half of their gains add up; otherwise the better half of them, and so on: channels
        that carry much the same overshoot where all of them move.
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
        """What it costs to move the channel in slot slots[i] of group at[i] (row) to that slot of each group (column).

        `at` and `slots` are int64 (k,), one free slot a group; returns (k, k), zero on the diagonal: the model's
        change with the other members at rest, cross terms between moving channels left out. As only one slot of a
        group is free, the threshold that a newcomer must pass and the rival it displaces are known exactly for every
        row: the counterfactual gradient of a permutation matrix.
        """
        cost = torch.stack([self._bundle_cost(bundle, at, slots) for bundle in self.bundles]).sum(0)
        return (cost - cost.diagonal()[:, None]).cpu()

    def move(self, at: Tensor, slots: Tensor, target: Tensor, cost: Tensor) -> None:
        """Send the free channel of each group at[i] to group at[target[i]], as far as the model falls.

        The cycles of `target` are moves that can be made apart: those that `cost` says gain are judged together,
        exactly; if the model does not fall, the better half of them, then a quarter, and so on.
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
        """Move channels from their (group, slot) to another if the whole move lowers the model."""
        groups = self.groups.clone()
        groups[target] = self.groups[source]
        to = target[0]
        channels = groups[to].view(1, -1)
        moves = [self._move(bundle, channels)[0] for bundle in self.bundles]
        if not self._commit(channels.flatten(), moves, -1e-12):
            return False
        self.groups = groups
        return True

    def _bundle_cost(self, bundle: Bundle, at: Tensor, slots: Tensor) -> Tensor:
        """The bundle's share of `placement_cost`, up to a constant for each row."""
        free = self.groups[at, slots]
        rest = self.groups[at][self.groups[at].ne(free[:, None])].view(len(at), -1)
        score = bundle.score[rest]
        last = ranks(score, 1) == self.pattern.n - 1  # of those kept were the free slot empty
        threshold, rival = (
            (values * last).sum(1) for values in (score, self._prune_cost(bundle, rest.flatten()).view_as(score))
        )
        return _place(bundle.score[free], self._prune_cost(bundle, free), threshold, rival)

    def _prune_cost(self, bundle: Bundle, channels: Tensor) -> Tensor:
        """The modelled loss of each weight pruned less that of the same weight kept, (k, rows)."""
        weight = bundle.weight[channels]
        curvature = self.damping / 2 * bundle.moments.diagonal()[channels, None]
        signed = weight - 2 * bundle.error[channels]  # an error is the weight or 0
        return signed.mul_(curvature).add_(bundle.slope[channels]).mul_(weight)

    def _move(self, bundle: Bundle, channels: Tensor) -> Tensor:
        """dE (sets, k, rows) if the channels (sets, k) stood in groups of m in the given order."""
        flat = channels.flatten()
        keep = self.pattern.mask_groups(bundle.score[flat].view(-1, self.pattern.m, bundle.score.shape[1]), dim=1)
        after = bundle.weight[flat].mul_(keep.logical_not_().flatten(0, 1))
        return after.sub_(bundle.error[flat]).view(*channels.shape, -1)

    def _gain(self, channels: Tensor, moves: list[Tensor]) -> Tensor:
        """The modelled change of the loss of each set over all bundles, (sets,)."""
        parts = [self._predict(bundle, channels, move) for bundle, move in zip(self.bundles, moves, strict=True)]
        return torch.stack(parts).sum(0)

    def _predict(self, bundle: Bundle, channels: Tensor, move: Tensor) -> Tensor:
        """The modelled change of the loss of each set, (sets,)."""
        block = bundle.moments[channels[:, :, None], channels[:, None, :]]
        field = bundle.coupled(torch.bmm(block, move)).mul_(self.damping / 2)
        field += bundle.slope[channels.flatten()].view_as(move)
        return field.mul_(move).sum((1, 2))

    def _commit(self, channels: Tensor, moves: list[Tensor], enough: float) -> bool:
        """Make these moves if together they change the model by `enough` or less; says whether."""
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


def _place(score: Tensor, own: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    """Sum over rows r of rival[g, r] where score[c, r] > threshold[g, r] and own[c, r] elsewhere: (c, g).

    All four are (k, rows). Rows go in blocks that stay in the processor's cache, and what is chosen goes through the
    kernel of ReLU's gradient, several times faster than a mask of booleans.
    """
    cost = own.sum(1, keepdim=True).repeat(1, len(threshold))
    rows = max(1, BLOCK // len(threshold))
    for block in zip(*(x.split(rows, 1) for x in (score, own, threshold, rival)), strict=True):
        scores, owns, limits, rivals = (x.contiguous() for x in block)
        above, difference = torch.empty_like(limits), torch.empty_like(rivals)
        for c in range(len(cost)):
            torch.sub(scores[c], limits, out=above)
            torch.sub(rivals, owns[c], out=difference)
            torch.ops.aten.threshold_backward.grad_input(difference, above, 0, grad_input=difference)
            cost[c] += difference.sum(1)
    return cost
