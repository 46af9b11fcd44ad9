"""Pairs of least cost, against the greedy rule they follow."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.matching.assignment import pair_up


def symmetric(n: int, seed: int) -> Tensor:
    cost = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cost + cost.T


def greedy(cost: Tensor) -> set[tuple[int, int]]:
    """The cheapest pair of those left, over and over."""
    n = len(cost)
    ranked = sorted((float(cost[i, j]), i, j) for i in range(n) for j in range(i + 1, n))
    taken: set[int] = set()
    pairs = set()
    for _, i, j in ranked:
        if not taken & {i, j}:
            pairs.add((i, j))
            taken |= {i, j}
    return pairs


@given(st.integers(1, 17), st.integers(0, 10**6))
def test_pairs_are_those_of_the_greedy_rule(n: int, seed: int) -> None:
    cost = symmetric(n, seed)
    found = [tuple(pair) for pair in pair_up(cost).tolist()]
    assert set(found) == greedy(cost)
    assert len(found) == n // 2


def test_equal_costs_still_make_disjoint_pairs() -> None:
    found = pair_up(torch.zeros(9, 9))
    assert found.shape == (4, 2)
    assert len(set(found.flatten().tolist())) == 8


@pytest.mark.parametrize("cost", [torch.zeros(3, 4), torch.full((4, 4), torch.nan)])
def test_costs_that_cannot_be_paired_are_refused(cost: Tensor) -> None:
    with pytest.raises(PermpruneError):
        inspect.unwrap(pair_up)(cost)  # without the check of shapes
