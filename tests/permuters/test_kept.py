"""Kept scores against sorting, and RIA's order against all assignments."""

from itertools import permutations
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.matching.assignment import random_parts
from permprune.pattern import Pattern
from permprune.permuters.kept import (
    ROWS,
    descending,
    kept_score,
    ria_order,
    scores_by_layer,
    stacked_scores,
    union_kept,
)
from permprune.pruning.problem import Part, Problem

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(5, 8)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 3])
def test_kept_score_is_the_sum_that_the_mask_leaves(pattern: Pattern, rows: int) -> None:
    score = random(5 * pattern.m, rows)
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(1))
    ordered = score[order].T.double()
    expected = (ordered * pattern.mask(ordered)).view(rows, 5, pattern.m).sum((0, 2))
    torch.testing.assert_close(kept_score(score, order.view(5, pattern.m), pattern), expected)


@given(size=st.integers(1, 7), count=st.integers(1, 9), seed=st.integers(0, 1000))
def test_descending_sorts_each_position(size: int, count: int, seed: int) -> None:
    members = random(size, 3, 4, seed=seed)
    assert torch.equal(torch.stack(descending(members, count)), members.sort(0, descending=True).values[:count])


@given(i=st.integers(1, 5), j=st.integers(1, 5), data=st.data())
def test_what_a_union_keeps(i: int, j: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, i + j))
    seed = data.draw(st.integers(0, 1000))
    x, y = random(i, 3, 6, seed=seed), random(j, 4, 6, seed=seed + 1)
    joined = torch.cat((x[:, :, None].expand(i, 3, 4, 6), y[:, None].expand(j, 3, 4, 6)))
    expected = joined.sort(0, descending=True).values[:n].sum((0, 3))
    torch.testing.assert_close(union_kept(descending(x, n), descending(y, n), n), expected)


def best_assignments(score: Tensor, pattern: Pattern, largest: int = 4) -> Tensor:
    """Deal to four groups, then twice for each slot try all assignments of the channels there, in each random part."""
    hands = score.sum(1).argsort(descending=True).view(pattern.m, 4)
    groups = torch.stack([hand.flip(0) if slot % 2 else hand for slot, hand in enumerate(hands)], 1)
    generator = torch.Generator().manual_seed(0)
    for slot in [*range(pattern.m)] * 2:
        for part in random_parts(4, largest, generator):
            candidates = []
            for target in permutations(part.tolist()):
                moved = groups.clone()
                moved[list(target), slot] = groups[part, slot]
                candidates.append(moved)
            groups = max(candidates, key=lambda moved: float(kept_score(score, moved, pattern).sum()))
    return groups


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_ria_makes_the_best_assignment_of_each_slot(pattern: Pattern, seed: int) -> None:
    score = random(4 * pattern.m, 2 * ROWS + 5, seed=seed).square()
    assert torch.equal(ria_order(lambda: score.split(7, 1), pattern), best_assignments(score, pattern).flatten())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ria_assigns_inside_random_parts_of_wide_problems(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permprune.permuters.kept.PART", 2 * pattern.m)
    score = random(4 * pattern.m, 2 * ROWS + 5).square()
    assert torch.equal(
        ria_order(lambda: score.split(7, 1), pattern), best_assignments(score, pattern, largest=2).flatten()
    )


def test_scores_of_large_problems_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, orders = Pattern(2, 4), []
    network = Mock(scores={"a": random(30, 16), "b": random(9, 32, seed=1)})
    network.rows_of.return_value = 39
    problem = Problem("order", 16, (Part("a", "x", torch.arange(16)), Part("b", "y", torch.arange(16) * 2)))
    for held in (2**10, 0):
        monkeypatch.setattr("permprune.permuters.kept.HELD", held)
        read = scores_by_layer(network, problem)
        assert (read() is read()) == bool(held)
        assert torch.equal(torch.cat([*read()], 1), stacked_scores(network, problem))
        orders.append(ria_order(read, pattern))
    assert torch.equal(*orders)


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e9])
@pytest.mark.parametrize("seed", range(3))
def test_huge_channels_do_not_blur_where_others_go(scale: float, seed: int) -> None:
    pattern = Pattern(2, 4)
    score = random(16, 400, seed=seed)
    score[:3] *= scale
    found, best = ria_order(lambda: score.split(7, 1), pattern).view(4, 4), best_assignments(score.double(), pattern)
    kept, most = (float(kept_score(score.double(), groups, pattern).sum()) for groups in (found, best))
    assert kept == pytest.approx(most, abs=1e-3, rel=0)
