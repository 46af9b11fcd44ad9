"""Exact assignment and cycles."""

import inspect
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.matching.assignment import assign, cycles


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_no_permutation_costs_less(n, seed):
    cost = random(n, n, seed=seed)
    rows = torch.arange(n)
    best = min(float(cost[rows, torch.tensor(p)].sum()) for p in permutations(range(n)))
    assert float(cost[rows, assign(cost)].sum()) == pytest.approx(best, abs=1e-5)


def test_gives_the_column_of_each_row():
    cost = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 1]])
    assert assign(cost).tolist() == [1, 2, 0]
    assert assign(cost).argsort().tolist() == [2, 0, 1]


def test_batched_equals_looped():
    cost = random(2, 3, 6, 6)
    together = assign(cost)
    assert together.shape == (2, 3, 6) and together.dtype == torch.int64
    assert torch.equal(together, torch.stack([torch.stack([assign(c) for c in row]) for row in cost]))


def test_takes_narrow_types_and_tensors_with_a_graph():
    cost = random(4, 4).bfloat16()
    assert torch.equal(assign(cost.requires_grad_()), assign(cost.detach().double()))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2), (0, 0), (0, 2, 2)])
def test_refuses_what_is_not_square(shape):
    with pytest.raises(PermpruneError, match="square"):
        inspect.unwrap(assign)(torch.zeros(shape))  # without the check of shapes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_costs_that_are_not_finite(bad):
    with pytest.raises(PermpruneError, match="NaN or infinite"):
        assign(torch.tensor([[0.0, bad], [0.0, 0.0]]))


@given(st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))))
def test_a_cycle_is_named_by_its_smallest_element(order):
    permutation = torch.tensor(order)
    label = cycles(permutation)
    assert torch.equal(label[permutation], label)
    for start in range(len(order)):
        orbit, at = {start}, order[start]
        while at != start:
            orbit.add(at)
            at = order[at]
        assert int(label[start]) == min(orbit)
