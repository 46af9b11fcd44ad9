"""Keys and values in few bits."""

import pytest
import torch

from permprune.kernels import library
from permprune.kernels.attention.states import token_bytes
from permprune.kv.coding import BITS, TYPES, balance, code, decode, hadamard
from permprune.kv.packing import Channels, PackedTokens, StatesLayout

ERRORS = {2: 0.12, 3: 0.036, 4: 0.0105, 5: 0.0042, 6: 0.0013}
"""The squared error of normal numbers by bits, at most."""


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [8, 24, 64, 80, 256])
def test_numbers_come_back_from_every_kernel(kernel: str, bits: int, width: int) -> None:
    channels, states = Channels.natural(2, width, bits), torch.randn(2, 2, 37, width)
    tokens = PackedTokens(channels, StatesLayout(None, TYPES[bits], signs=True))
    tokens.append(states)
    assert sum(part[0, 0, 0].nbytes for part in tokens.parts.values()) == token_bytes(TYPES[bits], width)
    assert (tokens.native_states() is None) == (not library.available())
    found = tokens.read(3, 37, torch.float32)
    torch.testing.assert_close(found, decode(tokens.parts, bits, width)[:, :, 3:])
    assert (found - states[:, :, 3:]).square().mean() < ERRORS[bits]


def test_zeros_stay_zeros_and_outliers_are_spread() -> None:
    states = torch.zeros(1, 1, 2, 64)
    states[..., 1, 5] = 1e4
    channels = Channels.natural(1, 64, 4)
    found = channels.restore(decode(code(channels.arrange(states), 4), 4, 64))
    assert not found[0, 0, 0].any()
    assert (found[0, 0, 1] - states[0, 0, 1]).norm() < 0.15e4


@pytest.mark.parametrize("width", [1, 20, 64, 96])
def test_rotations_are_orthogonal(width: int) -> None:
    matrix = hadamard(width, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width))


def test_balanced_channels_lose_least() -> None:
    spread, weight = torch.rand(2, 1, 16) * 5 + 0.1, torch.rand(2, 16) + 0.1
    states = torch.randn(2, 500, 16) * spread

    def loss(factor: torch.Tensor) -> torch.Tensor:
        return (weight / factor).square().sum(-1) * (states * factor[:, None]).square().mean(1).sum(-1)

    best = loss(balance(states, weight))
    for other in (torch.ones_like(weight), weight, 1 / spread[:, 0], balance(states, weight) * (1 + torch.rand(2, 16))):
        assert (best <= loss(other) * 1.0001).all()
