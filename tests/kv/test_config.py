"""The settings of a pruned cache."""

import pytest
import torch

from permprune.kv.config import AUTO, DENSE, SHARE, bits_of, default_pattern, pattern_of
from permprune.kv.packing import Channels, StatesLayout, encode
from permprune.pattern import Pattern


@pytest.mark.parametrize(
    ("width", "expected"), [(256, "129:256"), (128, "62:128"), (80, "37:80"), (64, "29:64"), (32, "12:32"), (8, "1:8")]
)
def test_the_default_is_one_group_for_the_head(width: int, expected: str) -> None:
    assert str(default_pattern(width)) == expected
    assert pattern_of(AUTO, width) == Pattern.parse(expected)
    assert pattern_of(DENSE, width) is None and pattern_of("4bit", width) is None
    assert [bits_of(text) for text in ("2bit", "6bit", "7bit", "4:8", DENSE)] == [2, 6, None, None, None]


@pytest.mark.parametrize("width", [20, 32, 64, 80, 100, 128, 256])
def test_the_default_keeps_what_the_bytes_allow(width: int) -> None:
    pattern, states = default_pattern(width), torch.randn(1, 1, 1, width)

    def share(kept: int) -> float:
        parts = encode(states, Channels.natural(1, width), StatesLayout(Pattern(kept, width), torch.int8, signs=True))
        return sum(part.nbytes for part in parts.values()) / (2 * width)

    assert share(pattern.n) <= SHARE < share(pattern.n + 1)
