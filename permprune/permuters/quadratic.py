"""A quadratic model of the loss as a function of one problem's masks, and moves of channels that lower it.

Around the current masks, for a change dE of the pruned part E = W - W_eff of the problem's weights, the model is

    dLoss = <slope, dE> + damping / 2 * sum_r fisher_r dE_r H dE_r^T

If the covariance of the rows is known, whose diagonal is fisher, the sum is sum_rs covariance_rs dE_r H dE_s^T.

With slope = fisher * (E H) and damping 1 the model is the layer's own output error, with rows weighted by the
sensitivity of the loss. With slope = -dLoss/dW_eff it is the end-to-end model of the "newton" and "learned" searches,
in which a damping above 1 accounts for the curvature between layers that move together.

The model is a sum over rows, of which it reads a block at a time. Of all rows it keeps only the slope, in the type of
the weights, where the network's tensors rest; E follows from the weights, their scores and the groups. If processes
divide the rows, each has those that it holds, and the sums over rows, of costs and changes of the model, are added.

Matrices here are channels first, (channels, rows), so that a group's weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from permprune.pattern import Pattern
from permprune.permuters.bundles import Bundle, Rows, read_bundles
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.kernels.search.placement import add_placement_cost
    from permprune.matching.assignment import cycles, groups_in, pair_up, random_parts
    from permprune.pruning.masked import MaskedLayers
    from permprune.pruning.problem import Problem
    from permprune.system import sharding

PART = 256
"""The largest number of channels that swap with each other; those of wider problems are divided at random. Chosen by
ablation, see docs/results/ablations.md."""


@dataclass(frozen=True)
class Pool:
    """Groups that exchange channels: their positions, and their channels, both in ascending order.

    `index` selects the channels: a slice, which makes no copy, if they are all channels.
    """

    groups: Tensor
    channels: Tensor
    index: slice | Tensor

    def submatrices(self, bundle: Bundle, sets: Tensor) -> Tensor:
        """Return the second moments of sets of the pool's channels, (sets, k, k); `sets` is int64 (sets, k)."""
        places = torch.searchsorted(self.channels, sets)
        return bundle.moments(self.channels)[places[:, :, None], places[:, None, :]]

    def product(self, bundle: Bundle, changed: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that multiplies the pool's rows of a matrix (channels, rows) by their second moments.

        Rows of the matrix are zero except where `changed`, bool (channels,), is True.
        """
        moments, places = bundle.moments(self.channels), changed[self.channels].nonzero().flatten()
        if 2 * len(places) >= len(self.channels):
            return lambda move: moments @ move[self.index]
        columns, channels = moments[places].T, self.channels[places]
        return lambda move: columns @ move[channels]


@dataclass(frozen=True)
class Block:
    """The matrices of a block of `rows`, (channels, rows), at the current groups.

    `slope` may be changed in place, after which `put_back` has to be called with it.
    """

    weight: Tensor
    score: Tensor
    slope: Tensor
    error: Tensor
    rows: Rows
    put_back: Callable[[Tensor], None]

    def pruned(self, groups: Tensor) -> Tensor:
        """Return the pruned weights with other groups."""
        return self.rows.pruned(self.weight, self.score, groups)


class QuadraticModel:
    """The model of one problem at its current groups of channels; each move updates the slopes.

    `pattern` has the size of the groups; layers that share the order may have others, whose groups divide these.
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
        gradient: Mapping[str, Tensor] | None = None,
        damping: float = 1.0,
        order: Tensor | None = None,
        covariance: dict[str, Tensor] | None = None,
    ) -> QuadraticModel:
        """Build the model at the masks of `order`, by default the network's current order.

        `fisher`, `gradient` and `covariance` are by layer, as in `Gradients`. Without `gradient` it is the local model,
        whose slope is fisher * (E H). If any layer of a bundle has no `covariance`, the bundle's rows are treated as
        independent.
        """
        bundles = read_bundles(network, problem, fisher, gradient, covariance)
        if order is None:
            order = network.orders[problem.name]
        model = cls(bundles, order, network.pattern_of(problem), damping)
        if gradient is None:
            for bundle in bundles:
                moments = bundle.moments(torch.arange(problem.size))
                for rows in bundle.rows:
                    for weight, score in rows.read():
                        rows.add(moments @ rows.pruned(weight, score, model.groups))
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

        If there are more than `PART` channels, the groups are first divided into pools at random, and swap only inside
        their pool. The model then leaves out the interaction of channels in different pools, as it leaves out that of
        different problems.
        """
        if not times:
            return
        count, m = self.groups.shape
        pools = [self._pool(groups) for groups in random_parts(count, groups_in(PART, m), generator)]
        drawn = [torch.randint(m, (count,), generator=generator) for _ in range(times)]
        costs = self._costs(pools, drawn[0])
        for slots, next_slots in zip(drawn, [*drawn[1:], None], strict=True):
            pairs_by_pool = [pool.groups[pair_up(cost + cost.T)] for pool, cost in zip(pools, costs, strict=True)]
            pairs = torch.cat(pairs_by_pool)
            every = torch.arange(len(pairs))
            i, j = slots[pairs].T
            channels = self.groups[pairs].flatten(1)
            first, second = channels[every, i].clone(), channels[every, m + j].clone()
            channels[every, i], channels[every, m + j] = second, first
            swapped = channels.view(-1, 2, m)
            sets = channels.split([len(pairs) for pairs in pairs_by_pool])
            gain = self._gains(self.groups.index_put((pairs,), swapped), pools, sets)
            ranked = gain.argsort()
            candidates = [
                (self.groups.index_put((pairs[chosen],), swapped[chosen]), float(gain[chosen].sum()) / 2)
                for chosen in _better_halves(ranked[gain[ranked] < -1e-12])
            ]
            costs = self._take_first(candidates, pools, next_slots)

    def placement_cost(self, free: Tensor, slots: Tensor) -> Tensor:
        """Return the cost of moving the channel in the free slot of each group (row) to that of each group (column).

        `free` and `slots` are int64 (k,): slot slots[i] of group free[i] is free. Returns (k, k) with zeros on the
        diagonal: the change of the model if the other members stay, without the cross terms between moving channels. As
        only one slot of a group is free, the score that a new member must exceed and the weight that it displaces are
        known exactly for every row; this is the counterfactual gradient with respect to a permutation matrix.
        """
        slot_of = torch.zeros(len(self.groups), dtype=torch.int64).index_put_((free,), slots)
        return self._costs([self._pool(free)], slot_of)[0]

    def move(self, free: Tensor, slots: Tensor, target: Tensor, cost: Tensor) -> None:
        """Move the free channel of each group free[i] to group free[target[i]], as far as this lowers the model.

        The cycles of `target` can be moved independently of each other. Those whose total `cost` is negative are tried
        together, with the exact change of the model; if it does not fall, the better half of them is tried, then the
        better quarter, and so on.
        """
        gain = cost[torch.arange(len(free)), target]
        cycle = cycles(target)
        total = gain.new_zeros(len(free)).index_add_(0, cycle, gain)
        ranked, candidates = total.argsort(), []
        for chosen in _better_halves(ranked[total[ranked] < -1e-12]):
            moving = torch.isin(cycle, chosen).nonzero().flatten()
            groups, to = self.groups.clone(), target[moving]
            groups[free[to], slots[to]] = self.groups[free[moving], slots[moving]]
            candidates.append((groups, -1e-12))
        self._take_first(candidates, [self._pool(torch.arange(len(self.groups)))], None)

    def _pool(self, groups: Tensor) -> Pool:
        channels = self.groups[groups].flatten().sort().values
        return Pool(groups, channels, slice(None) if len(channels) == self.groups.numel() else channels)

    def _take_first(
        self, candidates: list[tuple[Tensor, float]], pools: list[Pool], slots: Tensor | None
    ) -> list[Tensor]:
        """Move to the first of the candidates (groups, enough) that changes the model by at most `enough`, if any.

        Channels move inside `pools`. Most often the first candidate is taken. The change of the model follows from the
        slopes at the end of the step, so the model moves to each candidate, and moves on from there. Returns the
        placement costs of each pool at the new groups with these slots free, if there are any.
        """
        start, before = self.groups, self.change
        for groups, enough in candidates:
            costs = self._shift(groups, pools, slots)
            if self.change - before <= enough:
                return costs
        costs = self._shift(start, pools, slots)
        self.change = before
        return costs

    def _blocks(self, bundle: Bundle) -> Iterator[Block]:
        for rows in bundle.rows:
            for name, (weight, score) in zip(rows.slopes, rows.read(), strict=True):
                put_back = partial(rows.slopes.__setitem__, name)
                yield Block(weight, score, rows.slopes[name], rows.pruned(weight, score, self.groups), rows, put_back)

    def _gains(self, groups: Tensor, pools: list[Pool], sets: Sequence[Tensor]) -> Tensor:
        """Return the change of the model by each set's move to its places in `groups`, alone: fp64 (sets,).

        `sets` are those of each pool, int64 (sets, k): the channels of the groups that a set changes. No group is
        changed by two sets.
        """
        channels = torch.cat(list(sets))
        gain = torch.zeros(len(channels), dtype=torch.float64)
        for bundle in self.bundles:
            moments = torch.cat([pool.submatrices(bundle, inside) for pool, inside in zip(pools, sets, strict=True)])
            for block in self._blocks(bundle):
                move = block.pruned(groups).sub_(block.error)
                moves = move[channels.flatten()].view(*channels.shape, -1)
                products = torch.bmm(block.rows.coupled(moves), moves.mT).mul_(moments).sum((1, 2))
                linear = move.mul_(block.slope).sum(1)[channels].sum(1)
                gain += linear.add_(products, alpha=self.damping / 2).cpu()
        sharding.add_(gain)
        return gain

    def _shift(self, groups: Tensor, pools: list[Pool], slots: Tensor | None) -> list[Tensor]:
        """Move to other groups: update slopes and `change`; returns the placement costs there as `_take_first`."""
        changed = torch.zeros(groups.numel(), dtype=torch.bool)
        changed[groups[(groups != self.groups).any(1)].flatten()] = True
        if not changed.any():
            return [] if slots is None else self._costs(pools, slots)
        costs = [] if slots is None else _no_costs(pools)
        change = 0.0
        for bundle in self.bundles:
            products = [pool.product(bundle, changed) for pool in pools]
            for block in self._blocks(bundle):
                error = block.pruned(groups)
                move = error - block.error
                field = block.rows.coupled(_joined(pools, products, move)).mul_(self.damping)
                block.put_back(block.slope.add_(field))
                change += float((move * block.slope).sum() - field.mul_(move).sum() / 2)
                if slots is not None:
                    self._add_costs(costs, bundle, block, error, groups=groups, pools=pools, slots=slots)
        self.change += sharding.total(change)[0]
        self.groups = groups
        return _from_diagonal(costs)

    def _costs(self, pools: list[Pool], slots: Tensor) -> list[Tensor]:
        """Return the `placement_cost` of each pool; `slots` are the free slots of all groups, int64 (groups,)."""
        costs = _no_costs(pools)
        for bundle in self.bundles:
            for block in self._blocks(bundle):
                self._add_costs(costs, bundle, block, block.error, groups=self.groups, pools=pools, slots=slots)
        return _from_diagonal(costs)

    def _add_costs(
        self,
        costs: list[Tensor],
        bundle: Bundle,
        block: Block,
        error: Tensor,
        *,
        groups: Tensor,
        pools: list[Pool],
        slots: Tensor,
    ) -> None:
        slope, curvature = block.slope.to(block.weight.dtype), self.damping / 2 * bundle.diagonal
        pattern = block.rows.pattern
        for cost, pool in zip(costs, pools, strict=True):
            free = slots[pool.groups]
            parts = groups[pool.groups].view(len(free), -1, pattern.m)
            add_placement_cost(
                *(cost, block.score, block.weight, slope, error),
                curvature=curvature,
                groups=parts[torch.arange(len(free)), free // pattern.m],
                slots=free % pattern.m,
                pattern=pattern,
            )


def _better_halves(ranked: Tensor) -> Iterator[Tensor]:
    """Yield all of `ranked`, its first half, its first quarter and so on, each sorted in ascending order."""
    while len(ranked):
        yield ranked.sort().values
        ranked = ranked[: len(ranked) // 2]


def _no_costs(pools: list[Pool]) -> list[Tensor]:
    return [torch.zeros(len(pool.groups), len(pool.groups), dtype=torch.float64) for pool in pools]


def _from_diagonal(costs: list[Tensor]) -> list[Tensor]:
    """Sum over all rows of weights; from each row subtract its element on the diagonal, and round to fp32."""
    sharding.add_(*costs)
    return [(cost - cost.diagonal()[:, None]).float() for cost in costs]


def _joined(pools: list[Pool], products: list[Callable[[Tensor], Tensor]], move: Tensor) -> Tensor:
    """Return the products of all pools, (channels, rows)."""
    if len(pools) == 1:
        return products[0](move)
    joined = torch.empty_like(move)
    for pool, product in zip(pools, products, strict=True):
        joined[pool.index] = product(move)
    return joined
