"""The score that groups of channels keep, now and with other members, and RIA's search for the order that keeps most.

Matrices are channels first, (channels, rows). For two descending lists x and y, the sum of the n largest members of
their union is sum_i max(x_i, y_(n+1-i)), and max(x, y) = (x + y + |x - y|) / 2. The score that each of many lists keeps
with each of many others is therefore computed from a few matrices of L1 distances.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from permprune.matching.assignment import assign
from permprune.pattern import Pattern
from permprune.permuters.base import Scores
from permprune.pruning.problem import Problem
from permprune.system.resources import Work

ROWS = 64
"""Number of rows that are processed at a time, so that they fit into the processor's cache."""

PASSES = 2
"""Number of times that each slot is reassigned: a second pass still gains, further ones are not worth their time."""


def stacked_scores(network: Scores, problem: Problem, fisher: dict[str, Tensor] | None = None) -> Tensor:
    """Return the scores of all weights of a problem, (channels, rows); rows are multiplied by sqrt(fisher) if given."""
    total = sum(network.row_count(part.layer) for part in problem.parts)
    found, first = torch.empty(0), 0
    for part in problem.parts:
        rows = network.scores[part.layer][:, part.span]
        if not first:
            found = rows.new_empty(problem.size, total)
        own = found[:, first : first + len(rows)].copy_(rows.T)
        if fisher is not None:
            own *= fisher[part.layer].sqrt()
        first += len(rows)
    return found


def stacked_bytes(weights: int) -> int:
    """Return the bytes of the result of `stacked_scores` for this number of weights."""
    return 4 * weights


def assignment_work(channels: int, rows: int, m: int) -> Work:
    """Return the work of `deal_and_assign`: each slot of each group takes one distance for each other group and row."""
    return Work(distances=PASSES * m * (channels // m) ** 2 * rows)


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


def deal_and_assign(score: Tensor, pattern: Pattern) -> Tensor:
    """Search the order that keeps the most score: deal the channels to groups, then reassign them slot by slot.

    Channels sorted by total score are dealt to the groups, in alternating direction. Then, for one slot after the
    other, the channels in that slot are assigned to the groups so that they keep the most score (Zhang et al. 2024,
    "Plug-and-Play", section 3.2); this is done `PASSES` times. A channel with score c in a row, joining a group whose
    n-th largest other score is t, adds max(c - t, 0) = (c - t + |c - t|) / 2, in which only |c - t| depends on the
    assignment. `score` is (channels, rows); returns int64 (channels,).
    """
    hands = score.sum(1).argsort(descending=True, stable=True).cpu().view(pattern.m, -1).clone()
    hands[1::2] = hands[1::2].flip(1)
    groups = hands.T.contiguous()
    for slot in [*range(pattern.m)] * PASSES:
        free = groups[:, slot].clone()
        others = groups[:, torch.arange(pattern.m) != slot].T
        distance = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=score.device)
        for block in score.split(ROWS, 1):
            limit = descending(block[others], pattern.n)[-1]
            # scores above the highest limit add the same to all distances: clipped, so that they cost no precision
            distance += torch.cdist(block[free].minimum(limit.amax(0)), limit, p=1)
        groups[assign(-distance).cpu(), slot] = free
    return groups.flatten()
