"""Numbers of few bits."""

import pytest
import torch

from permprune.kernels.attention.states import MAGNITUDES, numbered, pack_planes, plane_bytes, unpack_planes


@pytest.mark.parametrize("bits", MAGNITUDES)
@pytest.mark.parametrize("width", [1, 16, 20, 64])
def test_numbers_are_packed_and_unpacked(bits: int, width: int) -> None:
    numbers = torch.randint(2**bits, (2, 50, width))
    planes = pack_planes(numbers, bits)
    assert planes.dtype == torch.uint8 and planes.shape == (2, 50, bits * plane_bytes(width))
    assert torch.equal(unpack_planes(planes, width), numbers)
    values = numbered(bits, planes.device)
    assert len(values) == 2**bits and (values.diff() > 0).all() and torch.equal(values, -values.flip(0))
