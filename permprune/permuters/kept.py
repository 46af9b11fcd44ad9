"""The score that groups of channels keep, now and with other members, and RIA's search for the order that keeps most.

Matrices are channels first, (channels, rows). For two descending lists x and y, the sum of the n largest members of
their union is sum_i max(x_i, y_(n+1-i)), and max(x, y) = (x + y + |x - y|) / 2. The score that each of many lists keeps
with each of many others is therefore computed from a few matrices of L1 distances (`union_kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from permprune.pattern import Pattern
from permprune.permuters.base import ScorePermuter, Scores
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.kernels.search.placement import add_placement_cost
    from permprune.matching.assignment import assign, groups_in, pair_up, random_parts
    from permprune.pruning.problem import Problem
    from permprune.system import sharding

ROWS = 64
"""Number of rows that are processed at a time, so that they fit into the processor's cache."""

READ = 2**16
"""Number of scores that are read at a time where costs are summed over all rows."""

HELD = 2**28
"""Number of scores of a problem that are held: 1 GiB. Those of larger ones are computed each time they are read."""

PART = 1536
"""The largest number of channels of the groups that channels are assigned to at a time."""

PASSES = 2
"""Number of times that each slot is reassigned: a second pass still gains, further ones are not worth their time."""


def stacked_scores(network: Scores, problem: Problem, fisher: dict[str, Tensor] | None = None) -> Tensor:
    """Return the scores of all weights of a problem, (channels, rows); rows are multiplied by sqrt(fisher) if given."""
    scores, first = torch.empty(0), 0
    for part, rows in zip(problem.parts, _scores(network, problem), strict=True):
        if not first:
            scores = rows.new_empty(problem.size, network.rows_of(problem))
        stacked = scores[:, first : first + rows.shape[1]].copy_(rows)
        if fisher is not None:
            stacked *= fisher[part.layer].sqrt()
        first += rows.shape[1]
    return scores


def scores_by_layer(network: Scores, problem: Problem) -> Callable[[], Iterable[Tensor]]:
    """Return a function that reads the scores of a problem, (channels, rows) of one layer after the other."""
    if problem.size * network.rows_of(problem) <= HELD:
        held = [rows.contiguous() for rows in _scores(network, problem)]
        return lambda: held
    return lambda: (rows.contiguous() for rows in _scores(network, problem))


def _scores(network: Scores, problem: Problem) -> Iterator[Tensor]:
    """The scores of each layer's columns that follow a problem, (channels, rows)."""
    return (network.scores[part.layer][:, part.span].T for part in problem.parts)


def kept_score(score: Tensor, groups: Tensor, pattern: Pattern) -> Tensor:
    """Sum the n largest scores of each group over rows; `groups` is int64 (count, m), the result is fp64 (count,)."""
    total = torch.zeros(len(groups), dtype=torch.float64, device=score.device)
    for block in score.split(ROWS, 1):
        for largest in descending(block[groups.T], pattern.n):
            total += largest.sum(1, dtype=torch.float64)
    return total.cpu()


def descending(members: Iterable[Tensor], count: int) -> list[Tensor]:
    """Return the `count` elementwise largest of equally shaped tensors, the largest first; all if there are fewer."""
    left, largest = list(members), []
    for _ in range(min(count, len(left))):
        for j in range(1, len(left)):
            left[0], left[j] = torch.maximum(left[0], left[j]), torch.minimum(left[0], left[j])
        largest.append(left.pop(0))
    return largest


def union_kept(x: list[Tensor], y: list[Tensor], n: int) -> Tensor:
    """Sum the n largest members of every list of `x` joined with every list of `y`, over rows.

    Element i of `x`, (p, rows), holds the i-th largest members of p lists; `y`, with elements (q, rows), likewise.
    Returns (p, q) of their type. At most n elements of each are read; together they must have at least n.
    """
    total = x[0].new_zeros(len(x[0]), len(y[0]))
    for i, j in zip(range(n), reversed(range(n)), strict=True):
        if i < len(x) and j < len(y):
            total += torch.cdist(x[i], y[j], p=1).add_(x[i].sum(1)[:, None]).add_(y[j].sum(1)).div_(2)
        elif i < len(x):
            total += x[i].sum(1)[:, None]
        elif j < len(y):
            total += y[j].sum(1)
    return total


@dataclass(frozen=True)
class RIAPermuter(ScorePermuter):
    """Keep the most score, with equally weighted rows (Zhang et al. 2024, "Plug-and-Play", section 3.2)."""

    name: ClassVar[str] = "ria"
    divides_rows = True

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        return ria_order(scores_by_layer(network, problem), network.pattern_of(problem))


def ria_order(read: Callable[[], Iterable[Tensor]], pattern: Pattern) -> Tensor:
    """Search the order that keeps the most score (Zhang et al. 2024, "Plug-and-Play", section 3.2).

    Channels sorted by total score are dealt to the groups, in alternating direction. Then, for one slot after the
    other, the channels in that slot are assigned to the groups so that they keep the most score; this is done `PASSES`
    times. If there are more than `PART` channels, the groups are divided into parts at random, for each slot anew, and
    channels are assigned to the groups of their part. `read` iterates over all scores, (channels, rows) of some rows at
    a time, in each pass anew; returns int64 (channels,).

    Of a pattern of pairs, channels that are large in the same rows become pairs, which are then ordered.
    """
    if pattern.unit > 1:
        pairs = _pairs(read)
        reduced = Pattern(pattern.n // pattern.unit, pattern.m // pattern.unit)
        return pairs[ria_order(lambda: (block[pairs].square_().sum(1).sqrt_() for block in read()), reduced)].flatten()
    total = _sum(read, lambda block: block.sum(1))
    hands = total.argsort(descending=True, stable=True).cpu().view(pattern.m, -1).clone()
    hands[1::2] = hands[1::2].flip(1)
    groups = hands.T.contiguous()
    generator = torch.Generator().manual_seed(0)
    for slot in [*range(pattern.m)] * PASSES:
        pools = random_parts(len(groups), groups_in(PART, pattern.m), generator)
        free = [groups[pool, slot] for pool in pools]
        others = [groups[pool][:, torch.arange(pattern.m) != slot].T for pool in pools]
        gains = [torch.zeros(len(pool), len(pool), dtype=torch.float64) for pool in pools]
        for block in read():
            for gain, channels, members in zip(gains, free, others, strict=True):
                _add_gain(gain, block, channels, members, pattern.n)
            del block  # before the next one is computed
        for pool, channels, gain in zip(pools, free, gains, strict=True):
            sharding.add_(gain)
            groups[pool[assign(-gain)], slot] = channels
    return groups.flatten()


def _pairs(read: Callable[[], Iterable[Tensor]]) -> Tensor:
    """Return pairs of channels whose squared scores are large in the same rows, int64 (channels / 2, 2)."""
    size = len(next(iter(read())))
    parts = torch.randperm(size, generator=torch.Generator().manual_seed(0)).split(PART)

    def alike(part: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda block: (energy := block[part].square()) @ energy.T

    return torch.cat([part[pair_up(-_sum(read, alike(part)).cpu())] for part in parts])


def _sum(read: Callable[[], Iterable[Tensor]], each: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum of `each(block)` over all blocks, and over the rows of all processes."""
    total = reduce(torch.add, map(each, read()))
    sharding.add_(total)
    return total


def _add_gain(gain: Tensor, score: Tensor, free: Tensor, others: Tensor, n: int) -> None:
    """Add the score that each group would keep more with each free channel to `gain`, fp64 (channels, groups).

    `free` are channels, int64 (count,), and `others` the other members of each group, int64 (m - 1, count). A channel
    with score c in a row adds max(c - t, 0) to a group whose n-th largest other score is t.
    """
    count = len(free)
    pairs = torch.arange(2 * count).view(2, count).T  # the channel is kept in place of t if its score is larger
    for block in score.split(max(1, READ // (2 * count)), 1):
        limit = descending(block[others], n)[-1]
        # scores above the highest limit add the same to all groups: clipped, so that they cost no precision
        scores = torch.cat([block[free].minimum(limit.amax(0)), limit])
        add_placement_cost(
            gain,
            *(scores, scores, torch.full_like(scores, -1), torch.zeros_like(scores)),
            curvature=scores.new_zeros(2 * count),
            groups=pairs,
            slots=torch.zeros(count, dtype=torch.int64),
            pattern=Pattern(1, 2),
        )
