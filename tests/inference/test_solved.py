"""A layer's values of int4, solved."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from permprune.inference.solved import solve_layer
from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern
from tests.kernels.product.weights import sparse


@given(st.integers(4, 40), st.integers(9, 50), st.sampled_from(["2:4", "1:4", "4:8"]))
def test_solved_values_cost_less_than_rounded_ones(rows: int, groups: int, text: str) -> None:
    pattern = Pattern.parse(text)
    width = groups * pattern.m
    weight = sparse(rows, width, pattern, seed=rows)
    generator = torch.Generator().manual_seed(groups)
    few = torch.randn(max(4, width // 8), width, generator=generator)  # inputs that are correlated
    x = torch.randn(500, len(few), generator=generator) @ few + 0.1 * torch.randn(500, width, generator=generator)
    found = solve_layer(weight, x.T @ x / len(x), paired=text == "2:4")
    solved = found.values
    assert not solved[weight == 0].any() and not found.targets[weight == 0].any()
    assert torch.equal(found.stored(found.targets), solved)
    packed = PackedWeight.pack(solved, pattern, torch.int4, found.scale)
    torch.testing.assert_close(packed.unpack(), solved)
    rounded = PackedWeight.pack(weight, pattern, torch.int4).unpack()
    assert (x @ (solved - weight).T).square().sum() < 0.8 * (x @ (rounded - weight).T).square().sum()


def test_a_channel_that_is_always_zero_keeps_its_weights() -> None:
    weight, x = sparse(8, 64, Pattern(2, 4)), torch.randn(100, 64)
    x[:, 5] = 0
    solved = solve_layer(weight, x.T @ x / len(x), paired=True)
    assert ((solved.values - weight)[:, 5].abs() <= 4 * solved.scale[:, 0].float()).all()
