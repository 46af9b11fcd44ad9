import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from permprune.errors import PermpruneError
from permprune.pattern import Pattern, ranks, tightest

patterns = st.integers(2, 12).flatmap(lambda m: st.builds(Pattern, st.integers(1, m - 1), st.just(m)))


@st.composite
def scores(draw):
    """A pattern and scores of (rows, groups, m), many of them tied."""
    pattern = draw(patterns)
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), pattern.m)
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32, allow_nan=False))
    return pattern, torch.from_numpy(draw(arrays.arrays("float32", shape, elements=values)))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("2:4", Pattern(2, 4)), (" 4 : 8 ", Pattern(4, 8)), ("1:16", Pattern(1, 16)), ("4:8p", Pattern(4, 8, 2))],
)
def test_parse(text, pattern):
    assert Pattern.parse(text) == pattern
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2:4:8", "a:b", "2.0:4", "-2:4", "2-4", "0:4", "4:4", "5:4", "0:0", "1:4p", "4:8q"]
)
def test_bad_patterns(text):
    with pytest.raises(PermpruneError, match=f'"{text}"'):
        Pattern.parse(text)


def test_density():
    assert Pattern(2, 4).density == 0.5


@given(scores())
def test_mask_keeps_the_n_best_of_each_group(case):
    pattern, score = case
    mask = pattern.mask(score.flatten(1)).view_as(score)
    assert mask.dtype == torch.bool
    assert (mask.sum(-1) == pattern.n).all()
    least_kept = score.masked_fill(~mask, torch.inf).amin(-1)
    best_dropped = score.masked_fill(mask, -torch.inf).amax(-1)
    assert (least_kept >= best_dropped).all()


@given(scores())
def test_pairs_stay_or_go_together(case):
    pattern, score = case
    doubled = Pattern(2 * pattern.n, 2 * pattern.m, 2)
    score = score.flatten(1).clamp(-1e9, 1e9)
    pairs = score.square().sqrt().repeat_interleave(2, 1)  # of equal weights, so that their pattern decides
    mask = doubled.mask(pairs)
    assert torch.equal(mask, pattern.mask(2 * pairs[:, ::2].square()).repeat_interleave(2, 1))
    kept = pairs.masked_fill(~mask, 0)
    assert doubled.holds(kept)
    split = torch.zeros(1, doubled.m)
    split[0, 0 : 2 * (pattern.n + 1) : 2] = 1.0  # one weight in more pairs than are kept
    assert not doubled.holds(split)


@given(scores())
def test_ties_go_to_the_earlier_weight(case):
    pattern, score = case
    expected = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for group in range(score.shape[1]):
            ranked = sorted(range(pattern.m), key=lambda i: (-score[row, group, i].item(), i))
            expected[row, group, ranked[: pattern.n]] = True
    assert torch.equal(pattern.mask(score.flatten(1)), expected.flatten(1))


@given(scores())
def test_masked_weights_hold_the_pattern(case):
    pattern, score = case
    weight = torch.ones_like(score).flatten(1)
    assert pattern.holds(weight * pattern.mask(score.flatten(1)))
    assert not pattern.holds(weight)


def test_mask_of_any_leading_shape():
    score = torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).mask(score)
    assert torch.equal(mask, torch.stack([Pattern(2, 4).mask(row) for row in score]))


def test_nan_score():
    score = torch.ones(2, 8)
    score[1, 3] = torch.nan
    with pytest.raises(PermpruneError, match="NaN"):
        Pattern(2, 4).mask(score)


@pytest.mark.parametrize("call", [Pattern(2, 4).mask, Pattern(2, 4).holds])
def test_width_that_m_does_not_divide(call):
    with pytest.raises(PermpruneError, match="6 weights, which 4 does not divide"):
        call(torch.ones(2, 6))


def test_width_error_names_the_layer():
    with pytest.raises(PermpruneError, match=r"^layers\.3\.up has rows of 10"):
        Pattern(2, 4).require_divisible(10, "layers.3.up")
    Pattern(2, 4).require_divisible(12, "layers.3.up")


@pytest.mark.parametrize("members", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ranks_are_those_of_a_stable_sort(members, dim):
    shape = [5, 6, 7]
    shape[dim] = members
    score = torch.randint(4, shape, generator=torch.Generator().manual_seed(members)).float()
    expected = score.sort(dim=dim, descending=True, stable=True).indices.argsort(dim)
    assert torch.equal(ranks(score, dim).long(), expected)


@given(scores())
def test_the_tightest_pattern_is_found_in_the_zeros(case):
    pattern, score = case
    weight = pattern.mask(score.flatten(1)).float()
    found = tightest(weight)
    assert found is not None and found.holds(weight) and found.density <= pattern.density
    if weight.shape[1] % 4 == 0:
        assert not Pattern(1, 4).holds(weight) or found.density <= 0.25


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 0, 2, 0, 3, 3, 0, 0]], Pattern(2, 4)),
        ([[1, 0, 2, 0, 3, 0, 3, 0]], Pattern(1, 2)),
        ([[1, 1, 1, 0, 0, 0, 0, 1]], Pattern(4, 8)),
        ([[1, 1, 1, 1, 0, 0, 0, 0]], Pattern(4, 8)),
        ([[0, 0, 0, 1], [1, 0, 0, 0]], Pattern(1, 4)),
        ([[1, 1, 1, 1]], None),
        ([[0, 0, 0, 0]], None),
        ([[0, 1, 2, 3] * 2, [1, 1, 1, 1] * 2], None),
        ([[1, 0, 1] * 5], Pattern(2, 3)),
        ([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], None),
    ],
)
def test_tightest(rows, pattern):
    assert tightest(torch.tensor(rows, dtype=torch.float32)) == pattern
