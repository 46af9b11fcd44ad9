"""CP: a search that regroups the channels of a few groups at a time to keep more score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from permprune.errors import PermpruneError
from permprune.options import Natural
from permprune.pattern import Pattern
from permprune.permuters.base import ScorePermuter, Scores
from permprune.permuters.kept import ROWS, descending, kept_score, stacked_scores, union_kept
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.problem import Problem

WIDE = 2048
"""Number of channels above which only random swaps of single channels are tried."""

ROUNDS = 200
"""Number of rounds of random swaps; a round tries one swap in each pair of a random pairing of the groups."""

SHUFFLED = 4
"""Number of groups whose channels an escape shuffles."""

GAIN = 1e-6
"""Share of their score by which groups must gain; it is above the rounding error of single precision."""

CHUNK = 32
"""Number of groups whose gains with all others are computed at a time."""


@dataclass(frozen=True)
class CP(ScorePermuter):
    """Keep the most score, with equally weighted rows, by `search` from the natural order (Pool and Yu 2021).

    `escapes` are those of `search`. The paper makes 100; on the wide layers of a model the default of 10 takes a tenth
    of the time.
    """

    name: ClassVar[str] = "cp"
    escapes: Natural = 10

    def order(self, network: Scores, problem: Problem, generator: torch.Generator) -> Tensor:
        score, pattern = stacked_scores(network, problem), network.pattern_of(problem)
        groups = problem.identity().view(-1, pattern.m)
        return search(score, groups, pattern, generator, self.escapes).flatten()


def search(score: Tensor, groups: Tensor, pattern: Pattern, generator: torch.Generator, escapes: int = 100) -> Tensor:
    """Return groups of channels that keep at least as much score as `groups`.

    This is the search over pairs of stripes with bounded regressions of Pool and Yu 2021, "Channel Permutations for N:M
    Sparsity". `score` is (channels, rows), `groups` is int64 (count, m), and so is the result.

    Disjoint pairs of groups are regrouped, the largest gains first, until no pair gains. For m up to 4 all partitions
    of a pair's channels are considered, for larger m all exchanges of one channel for another. Then, `escapes` times,
    the channels of a few random groups are shuffled (the descent would undo the paper's single swap), and the search
    descends again; the result is kept if it keeps more score. Above 2048 channels only random swaps are tried. Raises
    `PermpruneError` for a pattern of pairs.
    """
    if pattern.unit > 1:
        raise PermpruneError(f"cp keeps single weights, and {pattern} pairs: choose another permuter, such as newton")
    if len(score) > WIDE:
        return _swap_at_random(score, groups, pattern, generator)
    pairs = Pairs(score, groups, pattern)
    pairs.descend()
    for _ in range(escapes):
        pairs.escape(generator)
    return pairs.groups


class Pairs:
    """All pairs of groups, with the largest gain in kept score from regrouping the channels of each.

    The groups of a pair exchange one channel each, or, if m is 4, one or two. `pairs` is int64 (count, 2), the groups
    of each pair. A row of `partitions`, (partitions, 2 m), lists the positions among a pair's channels that form the
    new first group, then those of the second. `gain` is fp64 (count,); `choice`, int64 (count,), is the partition with
    that gain. `kept`, fp64 (groups,), is the score that each group keeps. `given` and `rest` list, for each number of
    exchanged channels, the subsets of positions that are given away and the positions that stay.
    """

    def __init__(self, score: Tensor, groups: Tensor, pattern: Pattern) -> None:
        count, m = groups.shape
        sizes = (1, 2) if m == 4 else (1,)
        self.given = [torch.tensor(list(combinations(range(m), size))) for size in sizes]
        self.rest = [torch.tensor(list(combinations(range(m), m - size))).flip(0) for size in sizes]  # complements
        partitions = [
            torch.cat((stay, m + got, gave, m + other))
            for given, rest in zip(self.given, self.rest, strict=True)
            for gave, stay in zip(given, rest, strict=True)
            for got, other in zip(given, rest, strict=True)
        ]
        self.score, self.pattern, self.partitions = score, pattern, torch.stack(partitions)
        self.pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
        self.groups = groups.clone()
        self.kept = kept_score(score, groups, pattern)
        self.gain = torch.zeros(len(self.pairs), dtype=torch.float64)
        self.choice = torch.zeros(len(self.pairs), dtype=torch.int64)
        self.refresh(torch.arange(count))

    def refresh(self, changed: Tensor) -> None:
        """Update gain and choice of all pairs that contain one of the `changed` groups, int64 (k,)."""
        count = len(self.groups)
        gain, choice = self.gain.view(count, count), self.choice.view(count, count)
        gain[changed] = 0.0
        gain[:, changed] = 0.0
        left = torch.ones(count, dtype=torch.bool)  # a pair is computed once, and stored at [a, b] or [b, a] only
        for chunk in changed.sort().values.split(CHUNK):
            others = left.nonzero().flatten()
            places = torch.searchsorted(others, chunk)
            best, which = self._gains(others, places)
            best[:, places] = best[:, places].triu(1)
            gain[chunk[:, None], others] = best
            choice[chunk[:, None], others] = which
            left[chunk] = False

    def descend(self) -> None:
        """Regroup disjoint pairs, those with the largest gains first, until no pair gains."""
        while len(picked := self._disjoint()):
            pairs = self.pairs[picked]
            channels = self.groups[pairs].flatten(1)
            groups = channels.gather(1, self.partitions[self.choice[picked]]).view(*pairs.shape, -1)
            kept = kept_score(self.score, groups.flatten(0, 1), self.pattern).view_as(pairs)
            better = kept.sum(1) > self.kept[pairs].sum(1)  # checked exactly, as `gain` may be rounded
            self.gain[picked] = 0.0
            self.groups[pairs[better]], self.kept[pairs[better]] = groups[better], kept[better]
            self.refresh(pairs[better].flatten())

    def escape(self, generator: torch.Generator) -> None:
        """Shuffle the channels of a few groups and descend; if this does not keep more score, restore everything."""
        before = self.groups, self.kept, self.gain, self.choice
        self.groups, self.kept, self.gain, self.choice = (x.clone() for x in before)
        shuffled = torch.randperm(len(self.groups), generator=generator)[:SHUFFLED]
        channels = self.groups[shuffled].flatten()
        self.groups[shuffled] = channels[torch.randperm(len(channels), generator=generator)].view(len(shuffled), -1)
        self.kept[shuffled] = kept_score(self.score, self.groups[shuffled], self.pattern)
        self.refresh(shuffled)
        self.descend()
        if self.kept.sum() <= before[1].sum():
            self.groups, self.kept, self.gain, self.choice = before

    def _disjoint(self) -> Tensor:
        """Choose pairs that gain and have no group in common, those with the largest gains first."""
        gaining = (self.gain > GAIN * self.kept[self.pairs].sum(1)).nonzero().flatten()
        ranked = gaining[self.gain[gaining].argsort(descending=True, stable=True)]
        used: set[int] = set()
        picked = []
        for number, groups in zip(ranked.tolist(), self.pairs[ranked].tolist(), strict=True):
            if used.isdisjoint(groups):
                used.update(groups)
                picked.append(number)
        return torch.tensor(picked, dtype=torch.int64)

    def _gains(self, others: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest gain of each group others[places] (row) with each of `others` (column), and its choice."""
        shapes = [(len(places), len(given), len(others), len(given)) for given in self.given]
        after = [torch.zeros(shape, dtype=torch.float64, device=self.score.device) for shape in shapes]
        for block in self.score.split(ROWS, 1):
            members = block[self.groups[others]]
            for total, given, rest in zip(after, self.given, self.rest, strict=True):
                gave, stay = (descending(members[:, some].unbind(2), self.pattern.n) for some in (given, rest))
                regrouped = self._join(stay, places, gave).view_as(total)
                total += regrouped
                # if half is given away, what stays is what another exchange gives away: the table has both groups
                halved = 2 * given.shape[1] == self.pattern.m
                total += regrouped.flip(1, 3) if halved else self._join(gave, places, stay).view_as(total)
        best, which = torch.cat([total.transpose(1, 2).flatten(2) for total in after], 2).max(2)
        return best.cpu() - self.kept[others[places], None] - self.kept[others], which.cpu()

    def _join(self, x: list[Tensor], places: Tensor, y: list[Tensor]) -> Tensor:
        """The score that lists of x of the groups at `places` keep with lists of y; all are (groups, subsets, rows)."""
        return union_kept([t[places].flatten(0, 1) for t in x], [t.flatten(0, 1) for t in y], self.pattern.n)


def _swap_at_random(score: Tensor, groups: Tensor, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """Try random swaps of two channels between the groups of random disjoint pairs, and keep those that gain."""
    groups, kept = groups.clone(), kept_score(score, groups, pattern)
    count, m = groups.shape
    for _ in range(ROUNDS):
        pairs = torch.randperm(count, generator=generator)[: count // 2 * 2].view(2, -1)
        slots = torch.randint(m, pairs.shape, generator=generator)
        swapped = groups[pairs].scatter(2, slots[:, :, None], groups[pairs, slots].flip(0)[:, :, None])
        after = kept_score(score, swapped.flatten(0, 1), pattern).view_as(pairs)
        better = (after - kept[pairs]).sum(0) > GAIN * kept[pairs].sum(0)
        groups[pairs[:, better]], kept[pairs[:, better]] = swapped[:, better], after[:, better]
    return groups
