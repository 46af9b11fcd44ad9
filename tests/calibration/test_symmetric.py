"""Symmetric matrices of which one triangle is stored."""

import pytest
import torch
from torch import Tensor

from permprune.calibration.symmetric import Symmetric, Symmetrics, stored_elements

CPU = torch.device("cpu")


def inputs(channels: int) -> Tensor:
    """Correlated inputs of many scales, one of which is always 0: (tokens, channels)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(96, 4, generator=generator) @ torch.randn(4, channels, generator=generator)
    own = torch.randn(96, channels, generator=generator)
    return (common + own) * torch.linspace(0, 300, channels)


def second_moments(x: Tensor) -> tuple[Symmetric, Tensor]:
    """X^T X as stored, of two parts of the rows, and in fp64."""
    found, wide = Symmetric.zeros(x.shape[1], CPU), x.double()
    for rows in x.split(64):
        found.add_products(rows)
    return found, wide.T @ wide


@pytest.mark.parametrize("channels", [24, 256, 600])
def test_products_are_as_exact_as_fp32(channels: int) -> None:
    found, exact = second_moments(inputs(channels))
    root = exact.diagonal().sqrt()
    assert ((found.dense() - exact).abs() <= 1e-6 * root[:, None] * root).all()
    assert torch.equal(found.dense(), found.dense().T)
    assert found.size == channels and found.nbytes == 4 * stored_elements(channels)


def test_autocast_does_not_round_the_products() -> None:
    (found, again), x = (Symmetric.zeros(24, CPU) for _ in range(2)), inputs(24)
    found.add_products(x)
    with torch.autocast("cpu", torch.bfloat16):
        again.add_products(x)
    assert torch.equal(found.dense(), again.dense())


@pytest.mark.parametrize("channels", [24, 600])
def test_correlations_have_an_exact_diagonal_and_small_errors(channels: int) -> None:
    whole, _ = second_moments(inputs(channels))
    found, expected = whole.correlations(), whole.dense()
    assert torch.equal(found.dense().diagonal(), expected.diagonal())
    root = expected.diagonal().sqrt()
    bound = expected.abs() / 2000 + 1e-7 * root[:, None] * root  # the second term for correlations near 0
    assert ((found.dense() - expected).abs() <= bound).all()
    assert found.dense().dtype == torch.float32
    assert found.nbytes == 2 * stored_elements(channels) + 4 * channels


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("count", [5, 300, 600])
def test_a_block_has_the_elements_of_the_whole(count: int, half: bool) -> None:
    stored, _ = second_moments(inputs(600))
    stored = stored.correlations() if half else stored
    channels, dense = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:count], stored.dense()
    for own in (channels, channels.sort().values):
        assert torch.equal(stored.block(own), dense[own][:, own])
    assert torch.equal(stored.main_diagonal(), dense.diagonal())


def test_a_triangle_takes_little_more_than_half() -> None:
    assert stored_elements(256) == 256**2
    assert 0.5 < stored_elements(8960) / 8960**2 < 0.52


def test_matrices_are_read_by_name() -> None:
    whole, _ = second_moments(inputs(24))
    found = Symmetrics({"here": whole})
    assert list(found) == ["here"] and len(found) == 1 and found.nbytes == whole.nbytes
    assert torch.equal(found["here"], whole.dense())
