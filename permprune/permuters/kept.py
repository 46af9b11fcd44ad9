"""The score that groups keep: its sum, what they would keep with other members, and RIA's search for the most.

Matrices are channels first, (channels, rows). For two descending lists x and y the n largest of their union sum to
sum_i max(x_i, y_(n+1-i)), and max(x, y) = (x + y + |x - y|) / 2: so a table of what many lists keep with many others
takes a few matrices of L1 distances.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from permprune.matching.assignment import assign
from permprune.pattern import Pattern
from permprune.pruning.masked import MaskedLayers
from permprune.pruning.problem import Problem

ROWS = 64
"""Rows that are worked on at a time, so that they stay in the processor's cache."""

PASSES = 2
"""Times that each slot is assigned anew: the second still gains, what more would gain is not worth the time."""


def stacked_scores(network: MaskedLayers, problem: Problem, fisher: dict[str, Tensor] | None = None) -> Tensor:
    """The scores of all weights along a problem's channels, (channels, rows); rows times sqrt(fisher) if given."""
    rows = [network.scores[part.layer][:, part.columns] for part in problem.parts]
    if fisher is not None:
        rows = [row * fisher[part.layer].sqrt()[:, None] for row, part in zip(rows, problem.parts, strict=True)]
    return torch.cat(rows).T.contiguous()


def kept_score(score: Tensor, groups: Tensor, pattern: Pattern) -> Tensor:
    """Sum over rows of the n largest scores in each group; `groups` is int64 (count, m), the result fp64 (count,)."""
    total = torch.zeros(len(groups), dtype=torch.float64, device=score.device)
    for block in score.split(ROWS, 1):
        for largest in descending(block[groups.T], pattern.n):
            total += largest.sum(1, dtype=torch.float64)
    return total.cpu()


def descending(members: Iterable[Tensor], count: int) -> list[Tensor]:
    """The `count` largest at each position of equally shaped tensors, the largest first; all if there are fewer."""
    left, largest = list(members), []
    for _ in range(min(count, len(left))):
        for j in range(1, len(left)):
            left[0], left[j] = torch.maximum(left[0], left[j]), torch.minimum(left[0], left[j])
        largest.append(left.pop(0))
    return largest


def union_kept(x: list[Tensor], y: list[Tensor], n: int) -> Tensor:
    """Sum over rows of the n largest of every list of `x` joined with every list of `y`.

    Element i of `x`, (p, rows), holds the i-th largest member of p lists; that of `y`, (q, rows), likewise. Returns
    (p, q) of their type. At most n elements of each are read; x and y together must have n.
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
    """The order that keeps the most score: channels dealt to groups, then one assignment for each slot.

    Channels sorted by their total go to the groups snake-wise; then, slot by slot, the channels there are put back
    where they keep the most (Zhang et al. 2024, "Plug-and-Play", section 3.2), `PASSES` times over. A channel c that
    joins a group whose n-th largest other member is t adds max(c - t, 0): their distances |c - t| decide which
    assignment is best. `score` is (channels, rows); returns int64 (channels,).
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
            # above the highest limit a channel adds to all distances alike: clipped, large ones cost no digits
            distance += torch.cdist(block[free].minimum(limit.amax(0)), limit, p=1)
        groups[assign(-distance).cpu(), slot] = free
    return groups.flatten()
