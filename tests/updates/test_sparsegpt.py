"""SparseGPT against Optimal Brain Surgeon done column by column with explicit inverses."""

import pytest
import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.pattern import Pattern
from permprune.updates.methods import SparseGPT

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(8, 16)]


def example(rows: int = 12, channels: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight, the second moments of correlated inputs of many scales, and a random order."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) * torch.rand(channels, generator=generator)
    inputs = torch.randn(4 * channels, channels, generator=generator) @ mixing
    weight = torch.randn(rows, channels, generator=generator)
    return weight, inputs.T @ inputs / len(inputs), torch.randperm(channels, generator=generator)


def surgeon(weight: Tensor, moments: Tensor, order: Tensor, pattern: Pattern, damping: float = 0.01) -> Tensor:
    """Optimal Brain Surgeon in fp64, in the order given: the inverse of H is downdated by elimination."""
    hessian = moments[order][:, order].double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse, w = torch.linalg.inv(hessian), weight[:, order].double()

    def without(matrix: Tensor, j: int) -> Tensor:
        return matrix - matrix[:, j : j + 1] @ matrix[j : j + 1] / matrix[j, j]

    for start in range(0, len(hessian), pattern.m):
        ahead, costs = inverse, []
        for j in range(start, start + pattern.m):
            costs.append(w[:, j].square() / ahead[j, j])
            ahead = without(ahead, j)
        kept = torch.stack(costs, 1).argsort(1, descending=True)[:, : pattern.n] + start
        for j in range(start, start + pattern.m):
            error = torch.where((kept == j).any(1), 0, w[:, j] / inverse[j, j])
            w = w - error[:, None] * inverse[j]
            inverse = without(inverse, j)
    pruned = torch.empty_like(w)
    pruned[:, order] = w
    return pruned


def output_error(weight: Tensor, pruned: Tensor, moments: Tensor) -> float:
    lost = (weight - pruned).double()
    return float(((lost @ moments.double()) * lost).sum())


def masked(weight: Tensor, score: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    kept = torch.zeros_like(weight)
    kept[:, order] = weight[:, order] * pattern.mask(score[:, order])
    return kept


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_is_the_optimal_brain_surgeon_in_stored_order(pattern):
    weight, moments, order = example()
    expected = surgeon(weight, moments, order, pattern)
    found = SparseGPT(block=16).apply(weight, moments, order, pattern)
    assert torch.equal(found != 0, expected.abs() > 1e-9)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_is_the_least_squares_optimum_where_the_weights_kept_come_last():
    """Then every weight that stays can make up for every one that goes."""
    weight, moments, _ = example(rows=5, channels=8)
    weight[:, 4:] += 100 * weight[:, 4:].sign()
    found = SparseGPT(damping=1e-6).apply(weight, moments, torch.arange(8), Pattern(4, 8))
    wide = moments.double()
    best = weight[:, 4:].double() + weight[:, :4].double() @ wide[:4, 4:] @ torch.linalg.inv(wide[4:, 4:])
    assert not found[:, :4].any()
    torch.testing.assert_close(found[:, 4:].double(), best, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_holds_the_pattern_and_loses_less_than_masks_alone(pattern, seed):
    weight, moments, order = example(rows=20, channels=144, seed=seed)
    before = weight.clone()
    found = SparseGPT().apply(weight, moments, order, pattern)
    assert torch.equal(weight, before) and found.shape == weight.shape and found.dtype == torch.float32
    assert found[:, order].unflatten(1, (-1, pattern.m)).ne(0).sum(-1).eq(pattern.n).all()
    wanda = masked(weight, weight.abs() * moments.diagonal().sqrt(), order, pattern)
    same_masks = weight * (found != 0)
    least = min(output_error(weight, other, moments) for other in (wanda, same_masks))
    assert output_error(weight, found, moments) < 0.9 * least


def test_an_order_is_the_natural_order_of_a_permuted_layer():
    weight, moments, order = example(channels=144)
    permuted = SparseGPT().apply(weight[:, order], moments[order][:, order], torch.arange(144), Pattern(2, 4))
    found = SparseGPT().apply(weight, moments, order, Pattern(2, 4))
    assert torch.equal(found[:, order], permuted)
    natural = SparseGPT().apply(weight, moments, torch.arange(144), Pattern(2, 4))
    assert not torch.equal(found != 0, natural != 0)


@pytest.mark.parametrize("block", [1, 30, 64, 1000])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(6, 12), Pattern(8, 16)], ids=str)
def test_the_block_size_changes_nothing(block, pattern):
    weight, moments, order = example(channels=144)
    expected = SparseGPT().apply(weight, moments, order, pattern)
    torch.testing.assert_close(SparseGPT(block=block).apply(weight, moments, order, pattern), expected)


def test_channels_that_are_always_zero_go_first_and_change_no_other():
    weight, moments, _ = example()
    dead = torch.arange(0, 48, 4)
    moments[dead], moments[:, dead] = 0, 0
    found = SparseGPT().apply(weight, moments, torch.arange(48), Pattern(3, 4))
    assert torch.equal(found == 0, torch.zeros_like(found, dtype=torch.bool).index_fill(1, dead, True))
    alive = torch.ones(48, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(found[:, alive], weight[:, alive])


def test_without_any_input_the_weights_that_stay_are_as_they_were():
    weight, moments, order = example()
    found = SparseGPT().apply(weight, torch.zeros_like(moments), order, Pattern(2, 4))
    assert found[:, order].unflatten(1, (-1, 4)).ne(0).sum(-1).eq(2).all()
    assert torch.equal(found, weight * found.ne(0))


def test_more_damping_is_tried_where_the_moments_are_not_positive():
    weight, moments, order = example()
    values, vectors = torch.linalg.eigh(moments)
    values[0] = -0.05 * values.mean()
    indefinite = vectors * values @ vectors.T
    assert torch.linalg.eigvalsh(indefinite + 0.01 * indefinite.diagonal().mean() * torch.eye(48))[0] < 0
    found = SparseGPT().apply(weight, indefinite, order, Pattern(2, 4))
    torch.testing.assert_close(found, SparseGPT(damping=0.1).apply(weight, indefinite, order, Pattern(2, 4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_moments_without_a_factor_are_refused(value):
    weight, moments, order = example()
    moments.diagonal().fill_(value)
    with pytest.raises(PermpruneError, match="no Cholesky factor even with more damping"):
        SparseGPT().apply(weight, moments, order, Pattern(2, 4))


def test_a_width_that_is_no_multiple_of_m_is_refused():
    weight, moments, order = example(channels=18)
    with pytest.raises(PermpruneError, match="which 4 does not divide"):
        SparseGPT().apply(weight, moments, order, Pattern(2, 4))
