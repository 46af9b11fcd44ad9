"""Sinkhorn iterations: against POT, against the exact assignment, and their gradient."""

import math

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.matching import Geometric, assign, sinkhorn

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
    plan = sinkhorn(cost, epsilon, iterations=5000, tolerance=1e-5)
    assert plan.converged
    torch.testing.assert_close(plan.matrix, expected.float(), atol=1e-4, rtol=0)


@given(seeds, st.integers(2, 12))
def test_annealed_it_reaches_the_exact_assignment(seed, n):
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    potentials = None
    for step in range(21):
        plan = sinkhorn(cost, Geometric(1.0, 1e-3)(step / 20), 500, 1e-3, potentials)
        potentials = plan.potentials
    best = float(cost.gather(1, assign(cost)[:, None]).sum())
    slack = 1e-3 * n * math.log(n) + n * float(plan.row_error)  # entropy of a plan, and mass out of place
    assert value(cost, plan.matrix) == pytest.approx(best, abs=slack)
    assert value(cost, torch.eye(n)[assign(-plan.matrix)]) <= best + slack


@given(seeds, sizes, st.floats(0.05, 10))
def test_the_last_update_makes_columns_sum_to_one_and_the_errors_are_the_sums(seed, n, epsilon):
    plan = sinkhorn(random(n, n, seed=seed), epsilon, iterations=7)
    assert plan.matrix.min() >= 0
    assert float(plan.column_error) < 1e-4
    assert float(plan.row_error) == float((plan.matrix.sum(-1) - 1).abs().max())
    assert float(plan.column_error) == float((plan.matrix.sum(-2) - 1).abs().max())
    assert plan.iterations == 7 and plan.converged is None


@given(st.data(), sizes, seeds)
def test_permuting_rows_and_columns_permutes_the_plan(data, n, seed):
    cost = random(n, n, seed=seed)
    rows, columns = (torch.tensor(data.draw(st.permutations(range(n)))) for _ in range(2))
    plan, moved = sinkhorn(cost, 0.5), sinkhorn(cost[rows][:, columns], 0.5)
    torch.testing.assert_close(moved.matrix, plan.matrix[rows][:, columns], atol=1e-5, rtol=1e-4)


@given(seeds, sizes)
def test_constants_added_to_rows_and_columns_change_nothing(seed, n):
    cost = random(n, n, seed=seed)
    shifted = cost + random(n, 1, seed=seed + 1) + random(1, n, seed=seed + 2)
    one, other = (sinkhorn(c, 1.0, 2000, 1e-5).matrix for c in (cost, shifted))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_batched_equals_looped():
    cost = random(2, 3, 6, 6)
    together = sinkhorn(cost, 0.2, iterations=20)
    assert together.row_error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(cost[i, j], 0.2, iterations=20)
            torch.testing.assert_close(together.matrix[i, j], alone.matrix)
            torch.testing.assert_close(together.row_error[i, j], alone.row_error, atol=1e-6, rtol=0)
            for ours, theirs in zip(together.potentials, alone.potentials, strict=True):
                torch.testing.assert_close(ours[i, j], theirs)


def test_a_batch_goes_on_until_its_hardest_problem_is_done():
    easy, hard = torch.zeros(4, 4), 5 * random(4, 4)
    alone = [sinkhorn(c, 0.5, 500, 1e-4).iterations for c in (easy, hard)]
    plan = sinkhorn(torch.stack([easy, hard]), 0.5, 500, 1e-4)
    assert alone[0] < alone[1] == plan.iterations
    assert plan.converged


def test_reports_when_the_tolerance_was_not_reached():
    plan = sinkhorn(random(6, 6), 0.01, iterations=3, tolerance=1e-6)
    assert plan.iterations == 3 and plan.converged is False and float(plan.row_error) > 1e-6


def test_starting_from_a_similar_problem_takes_fewer_iterations():
    cost = random(12, 12)
    similar = cost + 0.01 * random(12, 12, seed=1)
    near = sinkhorn(cost, 0.3, 1000, 1e-5)
    cold = sinkhorn(similar, 0.3, 1000, 1e-5)
    warm = sinkhorn(similar, 0.3, 1000, 1e-5, near.potentials)
    assert warm.iterations < cold.iterations
    torch.testing.assert_close(warm.matrix, cold.matrix, atol=1e-4, rtol=0)


def test_potentials_are_in_the_unit_of_the_costs():
    cost = random(5, 5)
    plan = sinkhorn(cost, 0.3)
    f, g = plan.potentials
    torch.testing.assert_close(((f[:, None] + g - cost) / 0.3).exp(), plan.matrix, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_gradient_agrees_with_finite_differences(tolerance):
    cost = random(2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.5, 12, tolerance).matrix, cost)


def test_fp32_gradient_agrees_with_fp64():
    cost, weight = random(6, 6), random(6, 6, seed=1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = cost.to(dtype, copy=True).requires_grad_()
        (sinkhorn(leaf, 0.2, 30).matrix * weight).sum().backward()
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_only_the_matrix_carries_the_graph():
    plan = sinkhorn(random(3, 3).requires_grad_(), 1.0, 5, 1e-3)
    assert plan.matrix.requires_grad
    assert not any(x.requires_grad for x in (plan.row_error, plan.column_error, *plan.potentials))


def test_narrow_types_are_computed_in_fp32():
    cost = random(4, 4).bfloat16()
    plan = sinkhorn(cost, 0.2)
    assert plan.matrix.dtype == torch.float32
    assert torch.equal(plan.matrix, sinkhorn(cost.float(), 0.2).matrix)


def test_large_costs_over_epsilon_do_not_overflow():
    cost = 1e4 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(sinkhorn(cost, 1e-2).matrix).all()


@pytest.mark.parametrize(
    "cost, settings, message",
    [
        (torch.full((2, 2), math.nan), {}, "NaN or infinite"),
        (torch.zeros(2, 3), {}, "square"),
        (torch.zeros(2, 2), {"epsilon": 0.0}, "epsilon is 0"),
        (torch.zeros(2, 2), {"epsilon": -1.0}, "epsilon is -1"),
        (torch.zeros(2, 2), {"epsilon": math.nan}, "epsilon is nan"),
        (torch.zeros(2, 2), {"iterations": 0}, "0 Sinkhorn iterations"),
        (torch.zeros(2, 2), {"tolerance": 0.0}, "tolerance is 0"),
        (torch.zeros(2, 2), {"potentials": (torch.zeros(2), torch.zeros(3))}, "do not fit"),
    ],
)
def test_refuses_bad_input(cost, settings, message):
    with pytest.raises(PermpruneError, match=message):
        sinkhorn(cost, **{"epsilon": 1.0, **settings})
