"""Random parts: every member once, in as few parts as the limit allows."""

import pytest
import torch

from permprune.matching.assignment import part_count, random_parts


@pytest.mark.parametrize(
    ("count", "largest", "sizes"), [(7, 7, [7]), (7, 4, [3, 4]), (8, 4, [4, 4]), (5, 2, [1, 2, 2])]
)
def test_parts_hold_every_member_once(count: int, largest: int, sizes: list[int]) -> None:
    parts = random_parts(count, largest, torch.Generator().manual_seed(0))
    assert sorted(len(part) for part in parts) == sizes and part_count(count, largest) == len(sizes)
    assert torch.cat(parts).sort().values.tolist() == list(range(count))
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_a_single_part_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    random_parts(9, 9, generator)
    assert torch.equal(generator.get_state(), before)
    random_parts(9, 8, generator)
    assert not torch.equal(generator.get_state(), before)
