"""ADMM against NumPy's least squares on the weights that are kept, row by row."""

import numpy as np
import pytest
import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.pattern import Pattern
from permprune.updates.methods import ADMM, SparseGPT, gradual_mask, pattern_mask

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(8, 16)]


def example(rows: int = 12, channels: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random weight, correlated inputs of many scales, their second moments, and a random order."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(channels) + 0.1 * torch.randn(channels, channels, generator=generator)
    scales = 10 ** (2 * torch.rand(channels, generator=generator) - 1)
    inputs = torch.randn(8 * channels, channels, generator=generator) @ mixing * scales
    weight = torch.randn(rows, channels, generator=generator) / scales.sqrt()
    return weight, inputs, inputs.T @ inputs / len(inputs), torch.randperm(channels, generator=generator)


def masked(weight: Tensor, moments: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    return weight * pattern.mask_in_order(weight.abs() * moments.diagonal().sqrt(), order)


def least_squares(weight: Tensor, inputs: Tensor, mask: Tensor, damping: float) -> Tensor:
    """The best weights in fp64; damping is a term for each channel, in units of its mean square."""
    x = inputs.double().numpy() / len(inputs) ** 0.5
    x = np.concatenate([x, np.diag(np.sqrt(damping * (x**2).sum(0)))])
    best = np.zeros(weight.shape)
    for row, (own, kept) in enumerate(zip(weight.double().numpy(), mask.numpy(), strict=True)):
        best[row, kept] = np.linalg.lstsq(x[:, kept], x @ own, rcond=None)[0]
    return torch.from_numpy(best)


def output_error(weight: Tensor, pruned: Tensor, moments: Tensor) -> float:
    lost = (weight - pruned).double()
    return float(((lost @ moments.double()) * lost).sum())


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_converges_to_the_least_squares_solution_of_its_mask(pattern: Pattern, damping: float) -> None:
    weight, inputs, moments, order = example()
    mask = masked(weight, moments, order, pattern) != 0
    expected = least_squares(weight, inputs, mask, damping)
    found = ADMM(damping=damping, iterations=1000, gradual=0).apply(weight, moments, order, pattern)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    short = ADMM(damping=damping, gradual=0).apply(weight, moments, order, pattern)
    assert output_error(weight, short, moments) < 1.01 * output_error(weight, found, moments)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_products_in_bf16_lose_no_more(seed: int, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moments, order = example(rows=64, channels=256, seed=seed)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("permprune.updates.methods.WIDE", 256)
        monkeypatch.setattr("permprune.updates.methods.fast_dtype", lambda _, dtype=dtype: dtype)
        found.append(ADMM(gradual=0 if given else 15).apply(weight, moments, order, Pattern(2, 4)))
    assert not torch.equal(*found)
    one, other = (output_error(weight, pruned, moments) for pruned in found)
    assert other == pytest.approx(one, rel=1e-3 if given else 5e-3)  # masks may differ where scores are alike


@pytest.mark.parametrize("penalty", [0.3, 3.0])
def test_the_penalty_changes_the_speed_and_not_the_solution(penalty: float) -> None:
    weight, inputs, moments, order = example()
    mask = masked(weight, moments, order, Pattern(2, 4)) != 0
    found = ADMM(damping=0, penalty=penalty, iterations=2000, gradual=0).apply(weight, moments, order, Pattern(2, 4))
    torch.testing.assert_close(found.double(), least_squares(weight, inputs, mask, 0.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_holds_the_pattern_and_loses_less_than_sparsegpt(pattern: Pattern, seed: int) -> None:
    weight, _, moments, order = example(rows=20, channels=144, seed=seed)
    before = weight.clone()
    found = ADMM().apply(weight, moments, order, pattern)
    assert torch.equal(weight, before) and found.shape == weight.shape and found.dtype == torch.float32
    assert found[:, order].unflatten(1, (-1, pattern.m)).ne(0).sum(-1).eq(pattern.n).all()
    assert output_error(weight, found, moments) < 0.9 * output_error(weight, weight * (found != 0), moments)
    other = SparseGPT().apply(weight, moments, order, pattern)
    assert output_error(weight, found, moments) < 1.02 * output_error(weight, other, moments)


@pytest.mark.parametrize("seed", range(3))
def test_masks_chosen_gradually_lose_less_than_those_of_wanda(seed: int) -> None:
    weight, _, moments, order = example(rows=20, channels=144, seed=seed)
    wanda, gradual = (ADMM(gradual=steps).apply(weight, moments, order, Pattern(2, 4)) for steps in (0, 15))
    assert torch.equal(wanda != 0, masked(weight, moments, order, Pattern(2, 4)) != 0)
    assert output_error(weight, gradual, moments) < output_error(weight, wanda, moments)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruning_rises_along_the_cubic_curve_to_the_pattern(pattern: Pattern) -> None:
    score = torch.rand(144, 20, generator=torch.Generator().manual_seed(0))
    last = torch.ones_like(score, dtype=torch.bool)
    for progress in (0.0, 0.2, 0.5, 1.0):
        keep = gradual_mask(score, pattern, progress)
        share = (1 - pattern.density) * (1 - (1 - progress) ** 3)
        assert abs(float((~keep).float().mean()) - share) < 1e-3
        assert not (keep & ~last).any() and (keep | ~pattern_mask(score, pattern)).all()
        last = keep
    assert torch.equal(last, pattern_mask(score, pattern))


@pytest.mark.parametrize("gradual", [0, 15])
def test_an_order_is_the_natural_order_of_a_permuted_layer(gradual: int) -> None:
    (weight, _, moments, order), method = example(channels=144), ADMM(gradual=gradual)
    found = method.apply(weight, moments, order, Pattern(2, 4))
    expected = method.apply(weight[:, order], moments[order][:, order], torch.arange(144), Pattern(2, 4))
    torch.testing.assert_close(found[:, order], expected)


def test_channels_that_are_always_zero_go_first_and_change_no_other() -> None:
    weight, _, moments, _ = example()
    dead = torch.arange(0, 48, 4)
    moments[dead], moments[:, dead] = 0, 0
    found = ADMM().apply(weight, moments, torch.arange(48), Pattern(3, 4))
    assert torch.equal(found == 0, torch.zeros_like(found, dtype=torch.bool).index_fill(1, dead, True))
    alive = torch.ones(48, dtype=torch.bool).index_fill(0, dead, False)
    torch.testing.assert_close(found[:, alive], weight[:, alive])


def test_without_any_input_the_weights_that_stay_are_as_they_were() -> None:
    weight, _, moments, order = example()
    found = ADMM().apply(weight, torch.zeros_like(moments), order, Pattern(2, 4))
    assert found[:, order].unflatten(1, (-1, 4)).ne(0).sum(-1).eq(2).all()
    torch.testing.assert_close(found, weight * found.ne(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_without_a_factor_are_refused(value: float) -> None:
    weight, _, moments, order = example()
    moments.diagonal().fill_(value)
    with pytest.raises(PermpruneError, match="have no Cholesky factor: calibrate with"):
        ADMM().apply(weight, moments, order, Pattern(2, 4))


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    weight, _, moments, order = example(channels=18)
    with pytest.raises(PermpruneError, match="which 4 does not divide"):
        ADMM().apply(weight, moments, order, Pattern(2, 4))


def test_a_mask_cannot_be_chosen_in_more_iterations_than_there_are() -> None:
    with pytest.raises(PermpruneError, match="gradual is 15: give at most the number of iterations, 10"):
        ADMM(iterations=10)
    assert ADMM(iterations=10, gradual=10).gradual == 10


@pytest.mark.parametrize("size", [1e-5, 0.0])
def test_a_channel_that_is_almost_zero_does_not_stand_for_others(size: float) -> None:
    weight, inputs, _, order = example()
    inputs[:, 5] = size * inputs[:, 7]
    moments = inputs.T @ inputs / len(inputs)
    pruned = ADMM().apply(weight, moments, order, Pattern(2, 4))
    assert float(pruned.abs().max()) < 10 * float(weight.abs().max())
