"""The score that groups of channels keep, now and with other members, and RIA's search for the order that keeps most.

Matrices are channels first, (channels, rows). For two descending lists x and y, the sum of the n largest members of
their union is sum_i max(x_i, y_(n+1-i)), and max(x, y) = (x + y + |x - y|) / 2. The score that each of many lists keeps
with each of many others is therefore computed from a few matrices of L1 distances (`union_kept`).
"""

from __future__ import annotations

from collections.abc import Iterable

from permprune.pattern import Pattern
from permprune.permuters.base import Scores
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

PART = 1536
"""The largest number of channels of the groups that channels are assigned to at a time."""

PASSES = 2
"""Number of times that each slot is reassigned: a second pass still gains, further ones are not worth their time."""


def stacked_scores(network: Scores, problem: Problem, fisher: dict[str, Tensor] | None = None) -> Tensor:
    """Return the scores of all weights of a problem, (channels, rows); rows are multiplied by sqrt(fisher) if given."""
    total = sum(network.row_count(part.layer) for part in problem.parts)
    scores, first = torch.empty(0), 0
    for part in problem.parts:
        rows = network.scores[part.layer][:, part.span]
        if not first:
            scores = rows.new_empty(problem.size, total)
        stacked = scores[:, first : first + len(rows)].copy_(rows.T)
        if fisher is not None:
            stacked *= fisher[part.layer].sqrt()
        first += len(rows)
    return scores


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


def ria_order(score: Tensor, pattern: Pattern) -> Tensor:
    """Search the order that keeps the most score (Zhang et al. 2024, "Plug-and-Play", section 3.2).

    Channels sorted by total score are dealt to the groups, in alternating direction. Then, for one slot after the
    other, the channels in that slot are assigned to the groups so that they keep the most score; this is done `PASSES`
    times. If there are more than `PART` channels, the groups are divided into parts at random, for each slot anew, and
    channels are assigned to the groups of their part. `score` is (channels, rows); returns int64 (channels,).

    Of a pattern of pairs, channels that are large in the same rows become pairs, which are then ordered.
    """
    if pattern.unit > 1:
        pairs = _pairs(score)
        size = score[pairs].square_().sum(1).sqrt_()
        return pairs[ria_order(size, Pattern(pattern.n // pattern.unit, pattern.m // pattern.unit))].flatten()
    total = score.sum(1)
    sharding.add_(total)
    hands = total.argsort(descending=True, stable=True).cpu().view(pattern.m, -1).clone()
    hands[1::2] = hands[1::2].flip(1)
    groups = hands.T.contiguous()
    generator = torch.Generator().manual_seed(0)
    for slot in [*range(pattern.m)] * PASSES:
        for pool in random_parts(len(groups), groups_in(PART, pattern.m), generator):
            free = groups[pool, slot]
            others = groups[pool][:, torch.arange(pattern.m) != slot].T
            groups[pool[assign(-_kept_by_joining(score, free, others, pattern.n))], slot] = free
    return groups.flatten()


def _pairs(score: Tensor) -> Tensor:
    """Return pairs of channels whose squared scores are large in the same rows, int64 (channels / 2, 2)."""
    energy, pairs = score.square(), []
    for part in torch.randperm(len(score), generator=torch.Generator().manual_seed(0)).split(PART):
        alike = energy[part] @ energy[part].T
        sharding.add_(alike)
        pairs.append(part[pair_up(-alike.cpu())])
    return torch.cat(pairs)


def _kept_by_joining(score: Tensor, free: Tensor, others: Tensor, n: int) -> Tensor:
    """Return the score that each group would keep more with each free channel: fp64 (channels, groups).

    `free` are channels, int64 (count,), and `others` the other members of each group, int64 (m - 1, count). A channel
    with score c in a row adds max(c - t, 0) to a group whose n-th largest other score is t.
    """
    count = len(free)
    gain = torch.zeros(count, count, dtype=torch.float64)
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
    sharding.add_(gain)
    return gain
