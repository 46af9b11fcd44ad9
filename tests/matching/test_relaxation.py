"""The two relaxations and the Gumbel noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permprune.matching.assignment import assign
from permprune.matching.sinkhorn import gumbel_noise, sinkhorn, straight_through


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(relaxation, cost: torch.Tensor, weight: torch.Tensor, **settings) -> torch.Tensor:
    leaf = cost.clone().requires_grad_()
    (relaxation(leaf, 0.3, **settings) * weight).sum().backward()
    return leaf.grad


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_straight_through_is_exactly_a_permutation(n, seed):
    matrix = straight_through(random(2, n, n, seed=seed), 0.3)
    assert set(matrix.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(matrix.sum(-1), torch.ones(2, n)) and torch.equal(matrix.sum(-2), torch.ones(2, n))


def test_straight_through_keeps_most_of_the_plan():
    cost = random(6, 6)
    hard = straight_through(cost, 0.3)
    assert torch.equal(hard.argmax(-1), assign(-sinkhorn(cost, 0.3)))


@pytest.mark.parametrize("settings", [{}, {"iterations": 5}])
def test_straight_through_has_the_gradient_of_the_soft_plan(settings):
    cost, weight = random(2, 6, 6), random(2, 6, 6, seed=1)
    hard = gradient(straight_through, cost, weight, **settings)
    assert hard.abs().max() > 0
    assert torch.equal(hard, gradient(sinkhorn, cost, weight, **settings))


def test_at_a_small_epsilon_the_relaxations_meet():
    cost = torch.tensor([[0.0, 1, 2], [2, 0, 1], [1, 2, 0]])[[2, 0, 1]]
    torch.testing.assert_close(sinkhorn(cost, 0.02), straight_through(cost, 0.02))


def test_noise_is_gumbel_and_follows_the_generator():
    noise = gumbel_noise((200, 100), 2.0, torch.Generator().manual_seed(0))
    assert noise.shape == (200, 100) and noise.dtype == torch.float32
    standard = noise.double().flatten() / 2
    for x in (-1.0, 0.0, 1.0, 3.0):  # the distribution function is exp(-exp(-x))
        share = (standard <= x).double().mean()
        expected = torch.tensor(-x, dtype=torch.float64).exp().neg().exp()
        assert float(share) == pytest.approx(float(expected), abs=0.015)
    assert torch.equal(noise, gumbel_noise((200, 100), 2.0, torch.Generator().manual_seed(0)))


def test_no_noise_at_scale_zero():
    assert torch.equal(gumbel_noise((4, 4), 0.0, torch.Generator().manual_seed(0)), torch.zeros(4, 4))
