"""A step of Adam for kept weights: against its formula in fp64, native against PyTorch's, and its rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.adam.step import EPSILON, adam_step, squared_sums
from permprune.kernels.search.masks import pack_mask

BETA = 0.9


def masked(rows: int, width: int, kept: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """A random mask that keeps `kept` weights in each row, and its generator."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, width, generator=generator).argsort(1)[:, :kept]
    return torch.zeros(rows, width, dtype=torch.bool).scatter_(1, chosen, True), generator


def some_roots(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, generator=generator) + 0.1, torch.rand(width, generator=generator) + 0.1


@given(rows=st.integers(1, 9), width=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_steps_are_those_of_the_formula_where_the_mask_keeps(rows: int, width: int, share: float, seed: int) -> None:
    kept = max(1, round(share * width))
    mask, generator = masked(rows, width, kept, seed)
    weight = torch.randn(rows, width, generator=generator)
    expected, expected_mean = weight.double(), torch.zeros(rows, width, dtype=torch.float64)
    bits, mean = pack_mask(mask), torch.zeros(rows, kept)
    for step, rate in enumerate([0.1, 0.03, 0.2], 1):
        gradient, roots = torch.randn(rows, width, generator=generator), some_roots(rows, width, generator)
        adam_step(weight, gradient, bits, mean, roots, step=step, rate=rate, beta=BETA)
        expected_mean = BETA * expected_mean + (1 - BETA) * gradient * mask
        expected -= rate * expected_mean / (1 - BETA**step) / (roots[0][:, None].double() * roots[1] + EPSILON)
    torch.testing.assert_close(weight, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_takes_the_same_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, generator = masked(33, 150, 70, 0)
    start, gradients = torch.randn(33, 150, generator=generator), torch.randn(3, 33, 150, generator=generator)
    roots, found = some_roots(33, 150, generator), []
    for runs in (True, False):
        monkeypatch.setattr(library, "available", lambda runs=runs: runs)
        weight, mean = start.to(dtype, copy=True), torch.zeros(33, 70, dtype=dtype)
        for step, gradient in enumerate(gradients.to(dtype), 1):
            adam_step(weight, gradient, pack_mask(mask), mean, roots, step=step, rate=0.01, beta=BETA, seed=step)
        found.append((weight, mean))
        assert torch.equal(weight[~mask], start.to(dtype)[~mask])
    for one, other in zip(*found, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        else:  # a few are rounded to the other neighbour
            assert (one != other).float().mean() < 0.05
            torch.testing.assert_close(one, other, atol=2**-7, rtol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 24), (9, 256), (4, 700), (0, 8)])
def test_sums_of_squares_are_those_of_what_the_mask_keeps(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, generator = masked(rows, width, -(-width // 2), 0)
    gradient, found = torch.randn(rows, width, generator=generator).to(dtype), []
    squares = (gradient.double() * mask).square()
    for name in [*library.names(), "torch"]:
        monkeypatch.setenv(library.FORCED, name)
        library.chosen.cache_clear()
        found.append(squared_sums(torch.where(mask, gradient, torch.nan), pack_mask(mask)))
        torch.testing.assert_close(found[-1], (squares.sum(1).float(), squares.sum(0).float()))
    library.chosen.cache_clear()
    assert all(torch.equal(*sums) for other in found[1:-1] for sums in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "kept"), [(1, 1), (7, 3), (64, 32), (150, 70), (40, 40)])
def test_every_kernel_gives_the_same_bits(
    width: int, kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, generator = masked(5, width, kept, 0)
    start, gradients = torch.randn(5, width, generator=generator), torch.randn(3, 5, width, generator=generator)
    start[0, 0], gradients[1, 2, 0] = float("inf"), float("nan")
    roots, found = some_roots(5, width, generator), []
    for name in library.names():
        monkeypatch.setenv(library.FORCED, name)
        library.chosen.cache_clear()
        weight, mean = start.to(dtype, copy=True), torch.zeros(5, kept, dtype=dtype)
        for step, gradient in enumerate(gradients.to(dtype), 1):
            adam_step(weight, gradient, pack_mask(mask), mean, roots, step=step, rate=0.01, beta=BETA, seed=step)
        found.append((weight, mean))
    library.chosen.cache_clear()
    for other in found[1:]:
        assert all(
            torch.equal(one.nan_to_num(9.0), two.nan_to_num(9.0)) for one, two in zip(found[0], other, strict=True)
        )


def test_steps_below_the_spacing_of_bfloat16_are_not_lost() -> None:
    weight, gradient = torch.ones(64, 256, dtype=torch.bfloat16), torch.ones(64, 256, dtype=torch.bfloat16)
    bits, mean = pack_mask(weight.bool()), torch.zeros(64, 256, dtype=torch.bfloat16)
    for step in range(1, 21):  # of 1e-4 each; the spacing is 2**-8 below 1
        roots = torch.ones(64), torch.ones(256)
        adam_step(weight, gradient, bits, mean, roots, step=step, rate=1e-4, beta=BETA, seed=step)
    assert float(1 - weight.double().mean()) == pytest.approx(20e-4, rel=0.05)
    assert {1 - 2**-8, 1.0} <= set(weight.flatten().tolist())


def test_weights_that_are_not_finite_stay_what_they_are() -> None:
    weight = torch.tensor([[float("inf"), float("nan"), -float("inf"), 1.0]], dtype=torch.bfloat16)
    bits, mean = pack_mask(torch.ones(1, 4, dtype=torch.bool)), torch.zeros(1, 4, dtype=torch.bfloat16)
    roots = torch.ones(1), torch.ones(4)
    adam_step(weight, torch.zeros_like(weight), bits, mean, roots, step=1, rate=0.1, beta=BETA, seed=7)
    assert torch.equal(weight.nan_to_num(5.0, 2.0, 3.0), torch.tensor([[2.0, 5.0, 3.0, 1.0]], dtype=torch.bfloat16))


def test_more_bits_than_moments_write_nothing_outside() -> None:
    weight, mean, roots = torch.zeros(1, 8), torch.zeros(3, 4)[1:2, :2].clone(), (torch.ones(1), torch.ones(8))
    adam_step(weight, torch.ones(1, 8), pack_mask(weight == 0), mean, roots, step=1, rate=0.1, beta=BETA)
    assert weight.ne(0).sum() == 2


def test_tensors_that_do_not_match_are_refused() -> None:
    weight, mean, roots = torch.zeros(2, 8), torch.zeros(2, 4), (torch.ones(2), torch.ones(8))
    bits = pack_mask(weight.bool())
    for wrong in (
        (weight, weight[:1], bits, mean, roots),
        (weight, weight, bits, mean.bfloat16(), roots),
        (weight, weight, bits[:1], mean, roots),
        (weight, weight, bits, mean[:1], roots),
        (weight, weight, bits, mean, roots[::-1]),
        (weight, weight, bits, mean, (roots[0], roots[1].double())),
        (weight.half(), weight.half(), bits, mean.half(), roots),
    ):
        with pytest.raises(PermpruneError, match="that match, in fp32 or bf16"):
            adam_step(*wrong, step=1, rate=0.1, beta=BETA)
