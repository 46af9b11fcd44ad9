"""The packed form: what goes in comes out, it costs what it should, and damage is found."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.packed import DTYPES, PackedWeight, pack_bits, unpack_bits
from permprune.pattern import Pattern
from tests.kernels.weights import packed, sparse

PATTERNS = ["2:4", "4:8", "8:16", "1:2", "1:4", "3:4", "2:3", "3:5", "2:7", "1:16", "15:16"]


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from([64, 128]),
)
def test_unpacks_to_what_was_packed(pattern: str, rows: int, groups: int, dtype: torch.dtype, block: int) -> None:
    found = Pattern.parse(pattern)
    weight = sparse(rows, groups * found.m, found)
    packed = PackedWeight.pack(weight, found, dtype, block)
    packed.check()
    assert packed.width == weight.shape[1]
    unpacked = packed.unpack()
    assert torch.equal(unpacked != 0, packed.unpack(torch.bfloat16) != 0)
    if dtype == torch.int8:
        assert packed.scale is not None
        steps = packed.scale.repeat_interleave(block, 1)[:, : weight.shape[1]]
        assert ((unpacked - weight).abs() <= steps * 0.5001).all()
    else:
        assert torch.equal(unpacked, weight.to(dtype).float())


@given(st.integers(1, 5), st.integers(1, 200))
def test_bits_go_in_and_out(rows: int, width: int) -> None:
    kept = torch.rand(rows, width) < 0.5
    mask = pack_bits(kept)
    assert mask.shape == (rows, -(-width // 64) * 8)
    assert torch.equal(unpack_bits(mask, width), kept)
    assert not unpack_bits(mask, mask.shape[1] * 8)[:, width:].any()


@pytest.mark.parametrize(
    ("pattern", "dtype", "bits"),
    [
        ("2:4", torch.float32, 17),
        ("2:4", torch.bfloat16, 9),
        ("4:8", torch.float16, 9),
        ("8:16", torch.bfloat16, 9),
        ("2:4", torch.int8, 5.5),
        ("1:4", torch.bfloat16, 5),
    ],
)
def test_bits_for_each_weight_of_the_dense_matrix(pattern: str, dtype: torch.dtype, bits: float) -> None:
    assert packed(4, 1024, pattern, dtype).nbytes * 8 == bits * 4 * 1024


def test_groups_with_more_zeros_than_the_pattern_asks_for() -> None:
    weight = torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 0]])
    packed = PackedWeight.pack(weight, Pattern(2, 4))
    packed.check()
    assert torch.equal(packed.unpack(), weight)


def test_a_block_of_zeros_in_int8() -> None:
    packed = PackedWeight.pack(torch.zeros(2, 64), Pattern(2, 4), torch.int8)
    packed.check()
    assert torch.equal(packed.unpack(), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("weight", "pattern", "dtype", "block", "words"),
    [
        (torch.ones(2, 8), "2:4", torch.float32, 64, "does not hold 2:4"),
        (torch.zeros(2, 6), "2:4", torch.float32, 64, "which 4 does not divide"),
        (torch.full((2, 8), torch.nan), "2:4", torch.float32, 64, "NaN or infinite"),
        (torch.tensor([[1e6, 0, 0, 0]]), "2:4", torch.float16, 64, "too large for float16"),
        (torch.zeros(2, 8), "2:4", torch.float64, 64, "cannot be packed as float64"),
        (torch.zeros(2, 32), "8:32", torch.float32, 64, "M is at most 16"),
        (torch.zeros(2, 8), "2:4", torch.int8, 32, "32 channels is not supported"),
    ],
)
def test_weights_that_cannot_be_packed(
    weight: Tensor, pattern: str, dtype: torch.dtype, block: int, words: str
) -> None:
    with pytest.raises(PermpruneError, match=words):
        PackedWeight.pack(weight, Pattern.parse(pattern), dtype, block)


def _with_bit(mask: Tensor, channel: int, value: int) -> Tensor:
    mask = mask.clone()
    mask[1, channel // 8] = mask[1, channel // 8] & ~(1 << channel % 8) | value << channel % 8
    return mask


def _damages() -> dict[str, tuple[dict[str, Any], str]]:
    good = packed(3, 72, dtype=torch.int8)
    assert good.scale is not None
    first = int(unpack_bits(good.mask, 72)[1].int().argmax())
    nan = good.scale.clone()
    nan[2, 1] = torch.nan
    return {
        "a position too few": ({"mask": _with_bit(good.mask, first, 0)}, "does not keep 2:4 in row 1"),
        "a position after the width": ({"mask": _with_bit(good.mask, 100, 1)}, "does not keep 2:4 in row 1"),
        "a mask too short": ({"mask": good.mask[:, :8]}, "mask of shape"),
        "a mask of another type": ({"mask": good.mask.short()}, "mask of shape"),
        "values too few": ({"values": good.values[:, :-1]}, "values of shape"),
        "values of rows that are not there": ({"values": good.values[:2]}, "mask of shape"),
        "values of another type": ({"values": good.values.int()}, "cannot be packed as int32"),
        "values in a line": ({"values": good.values.flatten()}, "values of shape"),
        "a scale that is NaN": ({"scale": nan}, "scale that is NaN"),
        "scales too few": ({"scale": good.scale[:, :1]}, "scale of shape"),
        "no scale": ({"scale": None}, "no scale"),
        "a scale too many": ({"values": good.values.float()}, "a scale but"),
        "an infinite value": ({"values": torch.full((3, 36), torch.inf), "scale": None}, "value that is NaN or inf"),
        "another pattern": ({"pattern": Pattern(3, 6)}, "does not keep 3:6"),
    }


@pytest.mark.parametrize("damage", _damages())
@pytest.mark.parametrize("by", ["native", "torch"])
def test_damage_is_found(damage: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    changes, words = _damages()[damage]
    with pytest.raises(PermpruneError, match=words):
        dataclasses.replace(packed(3, 72, dtype=torch.int8), **changes).check()
