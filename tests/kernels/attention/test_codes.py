"""Codes of the channels that a token keeps."""

import pytest
import torch

from permprune.kernels.attention.codes import code_bytes, pack_code, unpack_code
from permprune.pattern import Pattern

PATTERNS = [Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(1, 2), Pattern(4, 8), Pattern(3, 6), Pattern(12, 24)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("width", [24, 72, 264])
def test_codes_come_back(pattern: Pattern, width: int) -> None:
    kept = pattern.mask(torch.rand(2, 50, width))
    code = pack_code(kept, pattern)
    assert code.dtype == torch.uint8 and code.shape == (2, 50, code_bytes(pattern, width))
    assert torch.equal(unpack_code(code, pattern, width), kept)


def test_groups_of_four_take_two_or_three_bits() -> None:
    sizes = {str(pattern): code_bytes(pattern, 64) for pattern in PATTERNS[:5]}
    assert sizes == {"1:4": 4, "2:4": 6, "3:4": 4, "1:2": 8, "4:8": 8}


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_no_code_of_groups_of_four_keeps_another_number(pattern: Pattern) -> None:
    code = torch.randint(256, (1000, code_bytes(pattern, 64)), dtype=torch.uint8)
    assert (unpack_code(code, pattern, 64).unflatten(-1, (-1, 4)).sum(-1) == pattern.n).all()
