"""The settings of a pruned cache."""

import pytest
import torch

from permprune.kv.config import AUTO, DENSE, SHARES, default_pattern, pattern_of, stored_type
from permprune.kv.packing import Channels, Layout, encode
from permprune.pattern import Pattern


@pytest.mark.parametrize(
    ("width", "expected", "fewer_bits"),
    [
        (256, "129:256", "186:256"),
        (128, "62:128", "90:128"),
        (80, "37:80", "54:80"),
        (64, "29:64", "42:64"),
        (32, "12:32", "18:32"),
        (8, "1:8", "1:8"),
    ],
)
def test_the_default_is_one_group_for_the_head(width: int, expected: str, fewer_bits: str) -> None:
    for dtype, text in (("int8", expected), ("bf16", expected), ("int5", fewer_bits)):
        assert str(default_pattern(width, dtype)) == text
        assert pattern_of(AUTO, width, dtype) == Pattern.parse(text) and pattern_of(DENSE, width, dtype) is None


@pytest.mark.parametrize("width", [20, 32, 64, 80, 100, 128, 256])
@pytest.mark.parametrize("dtype", ["int8", "int5"])
def test_the_default_keeps_what_the_bytes_allow(width: int, dtype: str) -> None:
    pattern, states = default_pattern(width, dtype), torch.randn(1, 1, 1, width)

    def share(kept: int) -> float:
        parts = encode(states, Channels.natural(1, width), Layout(Pattern(kept, width), stored_type(dtype), signs=True))
        return sum(part.nbytes for part in parts.values()) / (2 * width)

    assert share(pattern.n) <= SHARES[dtype] < share(pattern.n + 1)
