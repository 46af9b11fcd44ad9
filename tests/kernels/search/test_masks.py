"""Masks and sums of the search, against PyTorch in float64 over random shapes, for every kernel that runs here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.search.masks import apply_mask, kept_sum, pack_mask, pruned_weights, write_mask
from permprune.pattern import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2), Pattern(3, 5), Pattern(7, 16)]


def scores(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Scores of few values, so that some are equal."""
    return torch.randint(6, (rows, width), generator=generator).float()


@given(st.sampled_from(PATTERNS), st.integers(1, 40), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.data())
def test_masks_are_those_of_the_pattern(
    pattern: Pattern, groups: int, rows: int, others: int, transposed: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    size = groups * pattern.m
    score = scores(rows, size + others, generator)
    columns = torch.randperm(size + others, generator=generator)[:size]
    expected = torch.rand(score.shape, generator=generator) < 0.5
    found = expected.clone()
    if transposed:
        score, found = score.T.contiguous().T, found.T.contiguous().T
    write_mask(found, score, columns, pattern)
    expected[:, columns] = pattern.mask(score[:, columns])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_kernel_masks_and_adds_up_the_same(kernel: str, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(1)
    width = 19 * pattern.m
    score, columns = scores(33, width, generator), torch.randperm(width, generator=generator)
    weight, gradient = (torch.randn(33, width, generator=generator) for _ in range(2))
    mask = torch.zeros(33, width, dtype=torch.bool)
    write_mask(mask, score, columns, pattern)
    assert torch.equal(mask[:, columns], pattern.mask(score[:, columns]))
    expected = float((weight.double() * gradient.double() * mask).sum())
    for strided in (weight, weight.T.contiguous().T):
        found = kept_sum(score, strided, gradient, columns, pattern)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 37), (9, 100)])
def test_every_kernel_finds_the_pruned_weights(kernel: str, pattern: Pattern, count: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    channels = count * pattern.m
    score, weight = scores(channels, rows, generator), torch.randn(channels, rows, generator=generator)
    order = torch.randperm(channels, generator=generator)
    found = pruned_weights(weight, score, order.view(count, -1), pattern)
    assert torch.equal(found, weight * ~pattern.mask_in_order(score.T, order).T)
    wide = pruned_weights(weight.double(), score.double(), order.view(count, -1), pattern)
    assert torch.equal(found.double(), wide)


def test_masks_do_not_depend_on_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    score, columns = torch.rand(600, 512, generator=generator), torch.randperm(512, generator=generator)
    masks, sums, threads = [], [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks.append(torch.zeros(600, 512, dtype=torch.bool))
            write_mask(masks[-1], score, columns, Pattern(2, 4))
            sums.append(kept_sum(score, score, score, columns, Pattern(2, 4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2]) and len(set(sums)) == 1


@pytest.mark.parametrize("wrong", [-1, 8])
def test_columns_that_do_not_exist_are_refused(wrong: int) -> None:
    score, columns = torch.rand(2, 8), torch.arange(8)
    columns[3] = wrong
    with pytest.raises(PermpruneError, match="names channels that do not exist"):
        write_mask(torch.zeros(2, 8, dtype=torch.bool), score, columns, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="names channels that do not exist"):
        kept_sum(score, score, score, columns, Pattern(2, 4))


def test_tensors_that_do_not_match_are_refused() -> None:
    score, columns, mask = torch.rand(2, 8), torch.arange(8), torch.zeros(2, 8, dtype=torch.bool)
    for arguments in ((mask[:1], score, columns), (mask.byte(), score, columns), (mask, score, columns.int())):
        with pytest.raises(PermpruneError, match=r"has (a mask|columns) of shape"):
            write_mask(*arguments, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="matrices of different shapes"):
        kept_sum(score, score[:, :4], score, columns, Pattern(2, 4))
    with pytest.raises(PermpruneError, match="has groups of shape"):
        pruned_weights(score.T, score.T, columns.view(4, 2), Pattern(2, 4))
    with pytest.raises(PermpruneError, match="has a mask of shape"):
        apply_mask(score, pack_mask(mask[:1]), torch.float32)


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(PermpruneError, match="which 4 does not divide"):
        write_mask(torch.zeros(2, 8, dtype=torch.bool), torch.rand(2, 8), torch.arange(6), Pattern(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 24, 41, 200])
def test_masked_weights_are_products_with_the_mask(kernel: str, dtype: torch.dtype, width: int) -> None:
    weight, mask = torch.randn(9, 2 * width), torch.rand(9, width) < 0.5
    bits = pack_mask(mask)
    for own in (weight[:, :width], weight[:, ::2], weight[:, width:].double()):
        assert torch.equal(apply_mask(own, bits, dtype), (own * mask).to(dtype))


def test_masked_weights_of_bf16_are_rounded_as_pytorch_does(kernel: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 1024), dtype=torch.int32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 0.0, 1.00390625])
    weight = torch.cat([bits.view(torch.float32), special.repeat(64, 1)], 1)
    every = pack_mask(torch.ones(weight.shape, dtype=torch.bool))
    found, expected = apply_mask(weight, every, torch.bfloat16), weight.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
