"""CP against brute force over all partitions of two groups."""

from collections.abc import Iterator
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from permprune.pattern import Pattern
from permprune.permuters import cp
from permprune.permuters.kept import kept_score


def random_score(channels: int, rows: int, seed: int) -> Tensor:
    return torch.randn(channels, rows, generator=torch.Generator().manual_seed(seed)).abs()


def natural(score: Tensor, pattern: Pattern) -> Tensor:
    return torch.arange(len(score)).view(-1, pattern.m)


def search(score: Tensor, pattern: Pattern, seed: int = 0, escapes: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = cp.search(score, natural(score, pattern), pattern, generator, escapes)
    assert torch.equal(groups.flatten().sort().values, torch.arange(len(score)))
    return groups


def total(score: Tensor, groups: Tensor, pattern: Pattern) -> float:
    return float(kept_score(score, groups, pattern).sum())


def partitions(channels: tuple[int, ...], m: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to share out channels among groups of m that differ in more than order."""
    if not channels:
        yield []
        return
    first, *others = channels
    for some in combinations(others, m - 1):
        for rest in partitions(tuple(c for c in others if c not in some), m):
            yield [(first, *some), *rest]


def exchanges(channels: tuple[int, ...], m: int) -> Iterator[list[tuple[int, ...]]]:
    """All exchanges of one of the first m channels for one of the last m."""
    for i in range(m):
        for j in range(m, 2 * m):
            swapped = list(channels)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            yield [tuple(swapped[:m]), tuple(swapped[m:])]


@cache
def all_ways(count: int, m: int) -> Tensor:
    """Everything that CP tries for `count` groups: places of their channels, (ways, count, m)."""
    places = tuple(range(count * m))
    return torch.tensor(list(partitions(places, m) if m <= 4 else exchanges(places, m)))


def most_kept(score: Tensor, groups: Tensor, pattern: Pattern) -> float:
    """The most that some groups together can keep, by trying all ways."""
    ways = groups.flatten()[all_ways(*groups.shape)]
    return float(kept_score(score, ways.flatten(0, 1), pattern).view(len(ways), -1).sum(1).max())


def most_gain(score: Tensor, groups: Tensor, pattern: Pattern) -> float:
    return most_kept(score, groups, pattern) - total(score, groups, pattern)


@settings(max_examples=40)
@given(
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(2, 3), Pattern(3, 6)]),
    count=st.integers(2, 4),
    rows=st.sampled_from([1, 7, 130]),
    seed=st.integers(0, 1000),
)
def test_pair_gains_are_those_of_all_partitions(pattern: Pattern, count: int, rows: int, seed: int) -> None:
    score = random_score(count * pattern.m, rows, seed)
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))
    sets = cp.Pairs(score, order.view(count, pattern.m), pattern)
    gain = sets.gain.view(count, count)
    assert (gain * gain.T == 0).all()  # each pair stands once
    for a, b in combinations(range(count), 2):
        expected = most_gain(score, sets.groups[[a, b]], pattern)
        found = float(gain[a, b] + gain[b, a])
        assert max(found, 0.0) == pytest.approx(max(expected, 0.0), abs=1e-6 * rows)
    for at in gain.flatten().nonzero().flatten():
        regrouped = sets.groups[sets.pairs[at]].flatten()[sets.partitions[sets.choice[at]]].view(2, -1)
        gained = total(score, regrouped, pattern) - float(sets.kept[sets.pairs[at]].sum())
        assert gained == pytest.approx(float(sets.gain[at]), abs=1e-6 * rows)


def test_gains_after_moves_are_those_of_a_fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "CHUNK", 3)
    pattern, score = Pattern(2, 4), random_score(40, 70, 0)
    sets = cp.Pairs(score, natural(score, pattern), pattern)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        sets.escape(generator)
    fresh = cp.Pairs(score, sets.groups, pattern)
    assert not torch.equal(sets.groups, natural(score, pattern))
    torch.testing.assert_close(sets.kept, fresh.kept)
    # which of its two groups a pair lists first depends on the moves
    kept, anew = (x.gain.clamp_min(0).view(10, 10) for x in (sets, fresh))
    torch.testing.assert_close(kept + kept.T, anew + anew.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(1, 3), Pattern(4, 8)], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_ends_where_no_pair_of_groups_gains(pattern: Pattern, seed: int) -> None:
    score = random_score(5 * pattern.m, 33, seed)
    groups = search(score, pattern)
    assert total(score, groups, pattern) > total(score, natural(score, pattern), pattern)
    for a, b in combinations(range(5), 2):
        both = groups[[a, b]]
        assert most_gain(score, both, pattern) <= 1.1 * cp.GAIN * total(score, both, pattern)


def test_escapes_never_lose_and_often_gain() -> None:
    pattern, score = Pattern(2, 4), random_score(48, 60, 1)
    sets = cp.Pairs(score, natural(score, pattern), pattern)
    sets.descend()
    generator = torch.Generator().manual_seed(0)
    history = [float(sets.kept.sum())]
    for _ in range(40):
        sets.escape(generator)
        history.append(float(sets.kept.sum()))
        assert history[-1] == pytest.approx(total(score, sets.groups, pattern), rel=1e-12)
    assert history == sorted(history) and len(set(history)) > 3


def test_equal_seeds_give_equal_groups() -> None:
    pattern, score = Pattern(2, 4), random_score(48, 30, 0)
    one, again, other = (search(score, pattern, seed, escapes=20) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_groups(count: int) -> None:
    pattern = Pattern(2, 4)
    score = random_score(4 * count, 9, 0)
    groups = search(score, pattern, escapes=5)
    if count < 3:
        assert total(score, groups, pattern) == pytest.approx(most_kept(score, natural(score, pattern), pattern))


def test_channels_that_tie_do_not_keep_the_search_going() -> None:
    pattern = Pattern(2, 4)
    for score in (torch.zeros(32, 5), torch.full((32, 100), 0.1), random_score(4, 70, 0).repeat(8, 1)):
        search(score, pattern, escapes=3)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_wide_problems_take_random_swaps_that_gain(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "WIDE", 8 * pattern.m)
    monkeypatch.setattr(cp, "Pairs", None)
    score = random_score(9 * pattern.m, 50, 0)
    kept = []
    for rounds in (0, 1, 2, 4, 100):
        monkeypatch.setattr(cp, "ROUNDS", rounds)
        kept.append(total(score, search(score, pattern), pattern))
    assert kept == sorted(kept) and kept[0] < kept[-1]
    assert torch.equal(search(score, pattern), search(score, pattern))
    assert not torch.equal(search(score, pattern), search(score, pattern, seed=1))
