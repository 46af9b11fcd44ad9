"""Sinkhorn iterations: against POT, against the exact assignment, and their gradient."""

import inspect
import math

import ot
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.matching.assignment import assign
from permprune.matching.sinkhorn import sinkhorn

seeds = st.integers(0, 10**6)
sizes = st.integers(1, 7)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value(cost: torch.Tensor, matrix: torch.Tensor) -> float:
    return float((cost * matrix).sum())


@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("n", [5, 16])
def test_agrees_with_pot(n, epsilon):
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(n, dtype=torch.float64)
    expected = ot.sinkhorn(ones, ones, cost.double(), epsilon, method="sinkhorn_log", stopThr=1e-10, numItermax=20_000)
    plan = sinkhorn(cost, epsilon, iterations=500)
    torch.testing.assert_close(plan, expected.float(), atol=1e-4, rtol=0)


@settings(max_examples=30)
@given(seeds, st.integers(2, 12))
@example(seed=181, n=10)
def test_at_a_small_epsilon_it_reaches_the_exact_assignment(seed, n):
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    plan = sinkhorn(cost, 5e-3, 500)
    best = float(cost.gather(1, assign(cost)[:, None]).sum())
    slack = 5e-3 * n * math.log(n) + n * float(
        (plan.sum(-1) - 1).abs().max()
    )  # entropy of a plan, and mass out of place
    assert value(cost, plan) == pytest.approx(best, abs=slack)
    assert value(cost, torch.eye(n)[assign(-plan)]) <= best + n * slack  # rounding may mix assignments of like cost


@given(seeds, sizes, st.floats(0.05, 10))
def test_the_last_update_makes_columns_sum_to_one(seed, n, epsilon):
    plan = sinkhorn(random(n, n, seed=seed), epsilon, iterations=7)
    assert plan.min() >= 0
    torch.testing.assert_close(plan.sum(-2), torch.ones(n), atol=1e-4, rtol=0)


@given(st.data(), sizes, seeds)
def test_permuting_rows_and_columns_permutes_the_plan(data, n, seed):
    cost = random(n, n, seed=seed)
    rows, columns = (torch.tensor(data.draw(st.permutations(range(n)))) for _ in range(2))
    plan, moved = sinkhorn(cost, 0.5), sinkhorn(cost[rows][:, columns], 0.5)
    torch.testing.assert_close(moved, plan[rows][:, columns], atol=1e-5, rtol=1e-4)


@given(seeds, sizes)
def test_constants_added_to_rows_and_columns_change_nothing(seed, n):
    cost = random(n, n, seed=seed)
    shifted = cost + random(n, 1, seed=seed + 1) + random(1, n, seed=seed + 2)
    one, other = (sinkhorn(c, 1.0, 100) for c in (cost, shifted))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_batched_equals_looped():
    cost = random(2, 3, 6, 6)
    together = sinkhorn(cost, 0.2, iterations=20)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(cost[i, j], 0.2, iterations=20)
            torch.testing.assert_close(together[i, j], alone)


def test_gradient_agrees_with_finite_differences():
    cost = random(2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.5, 12), cost)


def test_fp32_gradient_agrees_with_fp64():
    cost, weight = random(6, 6), random(6, 6, seed=1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = cost.to(dtype, copy=True).requires_grad_()
        (sinkhorn(leaf, 0.2, 30) * weight).sum().backward()
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_narrow_types_are_computed_in_fp32():
    cost = random(4, 4).bfloat16()
    plan = sinkhorn(cost, 0.2)
    assert plan.dtype == torch.float32
    assert torch.equal(plan, sinkhorn(cost.float(), 0.2))


def test_large_costs_over_epsilon_do_not_overflow():
    cost = 1e4 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(sinkhorn(cost, 1e-2)).all()


@pytest.mark.parametrize(
    "cost, message",
    [
        (torch.full((2, 2), math.nan), "NaN or infinite"),
        (torch.zeros(2, 3), "square"),
    ],
)
def test_refuses_bad_input(cost, message):
    with pytest.raises(PermpruneError, match=message):
        inspect.unwrap(sinkhorn)(cost, 1.0)  # without the check of shapes
