"""The packed form: what goes in comes out, it costs what it should, and damage is found."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.product.int4 import round_to_int4, search_scale
from permprune.kernels.product.layout import DTYPES
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
        steps = packed.scale.float().abs().repeat_interleave(64, 1)[:, : weight.shape[1]]
        assert ((unpacked - weight).abs() <= steps * (0.5001 if dtype == torch.int8 else 3)).all()
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


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0.2, 3))
def test_scales_of_int4_are_searched(blocks: int, slots: int, power: float) -> None:
    """They are not worse than that with which the largest weight is almost exact, and steps are the nearest."""
    weight = torch.randn(blocks, slots, generator=torch.Generator().manual_seed(slots))
    weight = weight.sign() * weight.abs() ** power
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    costs = []
    mantissa, exponent = torch.frexp(largest[:, 0] / -8)
    for scale in (search_scale(weight), torch.ldexp((32 * mantissa).round(), exponent - 5).bfloat16()):
        integers, steps = round_to_int4(weight, scale), scale.float()[:, None]
        error = (integers * steps - weight).abs()
        assert integers.min() >= -8 and integers.max() <= 7
        assert (error <= steps.abs() * 0.5001)[(integers > -8) & (integers < 7)].all()
        costs.append(error.square().sum(1))
    assert (costs[0] <= costs[1]).all()


def test_weights_that_are_steps_keep_their_values_in_bf16_too() -> None:
    weight = packed(64, 264, dtype=torch.int4)
    for dtype in (torch.float32, torch.bfloat16):
        again = PackedWeight.pack(weight.unpack(dtype), Pattern(2, 4), torch.int4)
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
        "an int4 scale that is NaN": (_changed("2:4", torch.int4, 9, 0x7F), "scale that is NaN"),
        "a scale that is NaN": (_changed("2:4", torch.int8, second + 8, torch.nan), "scale that is NaN"),
        "an infinite value": (_changed("2:4", torch.float32, 12, torch.inf), "value that is NaN or infinite"),
        "another width": (_replaced(width=132), "blocks of shape"),
        "another pattern": (_replaced(pattern=Pattern(4, 8)), "does not keep 4:8"),
        "another type": (_replaced(dtype=torch.float16), "blocks of shape"),
    }


@pytest.mark.parametrize("damage", _damages())
@pytest.mark.parametrize("by", ["native", "torch"])
def test_damage_is_found(damage: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "torch":
        monkeypatch.setattr(library, "available", lambda: False)
    weight, words = _damages()[damage]
    with pytest.raises(PermpruneError, match=words):
        weight.check()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("by", ["native", "torch"])
def test_nothing_is_found_in_a_good_weight(pattern: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "torch":
        monkeypatch.setattr(library, "available", lambda: False)
    for groups in (1, 17, 64):
        packed(4, groups * Pattern.parse(pattern).m, pattern).check()
