"""Second moments: their diagonal and the factor of their inverse."""

import pytest
import torch
from torch import Tensor

from permprune.calibration.moments import inverse_factor, root_mean_square
from permprune.errors import PermpruneError


def inputs(tokens: int = 96, channels: int = 24) -> Tensor:
    """Correlated inputs of many scales, (tokens, channels)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator) * torch.rand(channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ mixing


def test_root_mean_square_is_that_of_each_channel() -> None:
    x = inputs()
    torch.testing.assert_close(root_mean_square(x.T @ x / len(x)), x.square().mean(0).sqrt())


@pytest.mark.parametrize("tokens", [3, 96])
def test_the_factor_is_upper_and_gives_the_damped_inverse(tokens: int) -> None:
    x = inputs(tokens)
    moments = x.T @ x / len(x)
    before = moments.clone()
    factor = inverse_factor(moments, 0.01)
    assert torch.equal(moments, before) and torch.equal(factor, factor.triu())
    wide = moments.double()
    damped = wide + 0.01 * wide.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close((factor.T @ factor).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    for j in (0, 7, 23):
        last = torch.linalg.inv(damped[j:, j:])[0, 0]
        assert float(factor[j, j].square()) == pytest.approx(float(last), rel=1e-3)


def test_more_damping_where_little_gives_no_factor() -> None:
    moments = torch.diag(torch.tensor([-0.05, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(inverse_factor(moments, 0.01), inverse_factor(moments, 0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_no_damping_mends_such_moments(value: float) -> None:
    with pytest.raises(PermpruneError, match="no Cholesky factor even with more damping"):
        inverse_factor(torch.full((4, 4), value), 0.01)
    with pytest.raises(PermpruneError, match="no Cholesky factor: give a damping above 0"):
        inverse_factor(torch.full((4, 4), value), 0.0)
