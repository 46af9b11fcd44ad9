"""The packed form: what goes in comes out, it costs what it should, and damage is found."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels.product.int4 import (
    LARGEST,
    SMALLEST,
    nearest_steps,
    pack_scales,
    search_part,
    search_scale,
    stored_values,
    unpack_scales,
)
from permprune.kernels.product.layout import DTYPES, PART
from permprune.kernels.product.packed import PackedWeight, pack_bits, unpack_bits
from permprune.pattern import Pattern
from tests.kernels.product.weights import packed, sparse

PATTERNS = ["2:4", "4:8", "8:16", "1:2", "1:4", "3:4", "2:3", "3:5", "2:7", "1:16", "15:16"]


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
)
def test_unpacks_to_what_was_packed(pattern: str, rows: int, groups: int, dtype: torch.dtype) -> None:
    found = Pattern.parse(pattern)
    weight = sparse(rows, groups * found.m, found)
    packed = PackedWeight.pack(weight, found, dtype)
    packed.check()
    assert packed.layout.width == weight.shape[1]
    unpacked = packed.unpack()
    assert torch.equal(unpacked != 0, packed.unpack(torch.bfloat16) != 0)
    if packed.scale is not None:
        steps = packed.scale.float().abs().repeat_interleave(packed.layout.part, 1)[:, : weight.shape[1]]
        assert ((unpacked - weight).abs() <= steps * (0.5001 if dtype == torch.int8 else 5)).all()
    else:
        assert torch.equal(unpacked, weight.to(dtype).float())


@given(st.integers(1, 5), st.integers(1, 20))
def test_bits_go_in_and_out(rows: int, size: int) -> None:
    kept = torch.rand(rows, 8 * size) < 0.5
    mask = pack_bits(kept)
    assert mask.shape == (rows, size)
    assert torch.equal(unpack_bits(mask), kept)
    assert torch.equal(kept[:, 7], mask[:, 0] >= 128)


@pytest.mark.parametrize(
    ("pattern", "dtype", "bits"),
    [
        ("2:4", torch.float32, 17),
        ("2:4", torch.bfloat16, 9),
        ("4:8", torch.float16, 9),
        ("8:16", torch.bfloat16, 9),
        ("2:4", torch.int8, 5.5),
        ("2:4", torch.int4, 3.25),
        ("1:4", torch.int4, 2.25),
        ("3:5", torch.float32, 32 * 40 / 64 + 1),
        ("1:4", torch.bfloat16, 5),
    ],
)
def test_bits_for_each_weight_of_the_dense_matrix(pattern: str, dtype: torch.dtype, bits: float) -> None:
    assert packed(4, 320, pattern, dtype).nbytes * 8 == bits * 4 * 320


def test_groups_with_more_zeros_than_the_pattern_asks_for() -> None:
    weight = torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 0]])
    packed = PackedWeight.pack(weight, Pattern(2, 4))
    packed.check()
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
def test_a_block_of_zeros_in_integers(dtype: torch.dtype) -> None:
    packed = PackedWeight.pack(torch.zeros(2, 64), Pattern(2, 4), dtype)
    packed.check()
    assert torch.equal(packed.unpack(), torch.zeros(2, 64))


def _lattice(weights: Tensor, scale: float, paired: bool) -> Tensor:
    """The stored values nearest to weights, (groups, 4), by trying each lattice, in float64."""
    best, least = torch.zeros_like(weights), torch.full((len(weights),), torch.inf, dtype=weights.dtype)
    for odd in (0, 1) if paired else (0,):
        step = 2 if paired else 1
        steps = (step * torch.arange(-8, 8, dtype=weights.dtype) + odd) * scale
        near = steps[(weights.unsqueeze(-1) - steps).abs().argmin(-1)] * (weights != 0)
        errors = (near - weights).square().sum(1)
        if odd:
            errors[(weights != 0).sum(1) != 2] = torch.inf
        best, least = torch.where((errors < least)[:, None], near, best), torch.minimum(errors, least)
    return best


@given(st.sampled_from(["2:4", "1:4", "4:8"]), st.integers(1, 8), st.floats(0.2, 3))
def test_int4_takes_the_nearest_point_of_its_lattices(pattern: str, rows: int, power: float) -> None:
    weight = sparse(rows, 64, Pattern.parse(pattern), seed=rows).double() / 8
    weight, paired = weight.sign() * weight.abs() ** power, pattern == "2:4"
    for level in range(8):
        scale = (1 + level / 8) * 2**-6
        steps = nearest_steps(weight.float(), torch.full((rows,), scale), paired=paired)
        expected = _lattice(weight.view(-1, 4), scale, paired).view(rows, 64)
        cost, least = ((one - weight).square().sum(1) for one in (steps.double() * scale, expected))
        torch.testing.assert_close(cost, least, rtol=1e-5, atol=1e-9)
        assert not steps[weight == 0].any()


@given(st.integers(0, 50), st.booleans(), st.floats(0.4, 2))
def test_scales_of_int4_are_searched(seed: int, paired: bool, power: float) -> None:
    """Other levels and other exponents cost no less, but by chance in a block."""
    weight = sparse(64, 128, Pattern(2, 4), seed=seed)
    weight = (weight.sign() * weight.abs() ** power).clamp(-6, 6).unflatten(1, (-1, 64))
    scale = search_scale(weight, paired=paired)
    assert torch.equal(unpack_scales(pack_scales(scale)), scale)
    parts, exponent = weight.unflatten(-1, (-1, PART)), torch.frexp(scale.float())[1] - 1
    assert (exponent == exponent[..., :1]).all()
    found = search_part(parts, exponent, paired=paired)[1].sum(-1)
    for other in (exponent - 1, exponent, exponent + 1):
        cost = search_part(parts, other.clamp(-13, 2), paired=paired, all_levels=True)[1].sum(-1)
        assert found.sum() <= 1.06 * cost.sum() and (found <= 3 * cost).all()


def test_pairs_of_lattices_halve_the_error() -> None:
    weight = sparse(64, 256, Pattern(2, 4))
    scale = search_scale(weight.unflatten(1, (-1, 64)), paired=True).flatten(1)
    lattices, steps = stored_values(weight, scale, paired=True), stored_values(weight, 2 * scale, paired=False)
    errors = [float((one - weight).square().mean()) for one in (lattices, steps)]
    assert errors[0] < 0.55 * errors[1]


def test_all_magnitudes_that_int4_takes_have_scales() -> None:
    for largest in (SMALLEST, 0.01, 1.0, LARGEST):
        weight = sparse(4, 64, Pattern(2, 4))
        weight *= largest / weight.abs().max()
        found = PackedWeight.pack(weight, Pattern(2, 4), torch.int4).unpack()
        assert (found - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_weights_that_are_steps_keep_their_values_in_bf16_too(pattern: str) -> None:
    weight = packed(96, 264, pattern, torch.int4)
    for dtype in (torch.float32, torch.bfloat16):
        again = PackedWeight.pack(weight.unpack(dtype), Pattern.parse(pattern), torch.int4)
        assert torch.equal(again.unpack(), weight.unpack())


@pytest.mark.parametrize(
    ("weight", "pattern", "dtype", "words"),
    [
        (torch.ones(2, 8), "2:4", torch.float32, "does not hold 2:4"),
        (torch.zeros(2, 6), "2:4", torch.float32, "which 4 does not divide"),
        (torch.full((2, 8), torch.nan), "2:4", torch.float32, "NaN or infinite"),
        (torch.tensor([[1e6, 0, 0, 0]]), "2:4", torch.float16, "too large for float16"),
        (torch.zeros(2, 8), "2:4", torch.float64, "cannot be packed as float64"),
        (torch.zeros(2, 32), "8:32", torch.float32, "M is at most 16"),
        (torch.tensor([[60.0, 0, 0, 0]]), "2:4", torch.int4, "is 60, which has to be between .* pack as int8"),
        (torch.tensor([[9e-4, 0, 0, 0]]), "2:4", torch.int4, "is 0.0009, which has to be between .* pack as int8"),
    ],
)
def test_weights_that_cannot_be_packed(weight: Tensor, pattern: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(PermpruneError, match=words):
        PackedWeight.pack(weight, Pattern.parse(pattern), dtype)


WIDTH = 72
"""Channels of a row with one full block and one of eight channels."""


def _changed(pattern: str, dtype: torch.dtype, byte: int, value: int | float, row: int = 1) -> PackedWeight:
    """A good weight with one byte of a row, or the number that begins there, replaced."""
    good = packed(3, WIDTH, pattern, dtype)
    if isinstance(value, int):
        good.blocks[row, byte] = value
    else:
        good.blocks[row].view(torch.float32)[byte // 4] = value
    return good


def _replaced(blocks: Tensor | None = None, **layout: Any) -> PackedWeight:
    good = packed(3, WIDTH, dtype=torch.int8)
    return PackedWeight(dataclasses.replace(good.layout, **layout), good.blocks if blocks is None else blocks)


def _damages() -> dict[str, tuple[PackedWeight, str]]:
    blocks = packed(3, WIDTH, dtype=torch.int8).blocks
    second = blocks.shape[1] // 2  # where the second block begins
    return {
        "two equal positions": (_changed("2:4", torch.int8, 3, 0x44 | 5), "does not keep 2:4 in row 1"),
        "positions that descend": (_changed("2:4", torch.int8, 0, 0x41), "does not keep 2:4 in row 1"),
        "positions after the width": (_changed("2:4", torch.int8, second + 7, 0xE4), "does not keep 2:4 in row 1"),
        "a mask that keeps one more": (_changed("4:8", torch.int8, 2, 0x1F), "does not keep 4:8 in row 1"),
        "a mask that keeps one less": (_changed("4:8", torch.int8, 2, 0x07), "does not keep 4:8 in row 1"),
        "a mask after the width": (_changed("4:8", torch.int8, second + 1, 1), "does not keep 4:8 in row 1"),
        "rows too short": (_replaced(blocks[:, :-1]), "blocks of shape"),
        "blocks of another type": (_replaced(blocks.short()), "blocks of shape"),
        "blocks in a line": (_replaced(blocks.flatten()), "blocks of shape"),
        "two equal positions of int4": (_changed("2:4", torch.int4, 3, 0x44 | 5), "does not keep 2:4 in row 1"),
        "positions of int4 after the width": (_changed("2:4", torch.int4, 26 + 7, 0xE4), "does not keep 2:4 in row 1"),
        "a scale that is NaN": (_changed("2:4", torch.int8, second + 8, torch.nan), "scale that is NaN"),
        "an infinite value": (_changed("2:4", torch.float32, 12, torch.inf), "value that is NaN or infinite"),
        "another width": (_replaced(width=132), "blocks of shape"),
        "another pattern": (_replaced(pattern=Pattern(4, 8)), "does not keep 4:8"),
        "another type": (_replaced(dtype=torch.float16), "blocks of shape"),
    }


@pytest.mark.parametrize("damage", _damages())
def test_damage_is_found(damage: str) -> None:
    weight, words = _damages()[damage]
    with pytest.raises(PermpruneError, match=words):
        weight.check()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_is_found_in_a_good_weight(pattern: str) -> None:
    for groups in (1, 17, 64):
        packed(4, groups * Pattern.parse(pattern).m, pattern).check()
