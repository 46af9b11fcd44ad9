"""The reference implementations of other caches: their errors and their bytes."""

import runpy
from pathlib import Path

import pytest
import torch

from permprune.kv.config import KVConfig
from permprune.kv.packing import Channels

RIVALS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kv_rivals.py"))
QUANTISED = RIVALS["QUANTISED"]

# bits of a state, and the squared error of normal states, relative to theirs; of Lloyd-Max codes by Max (1960)
EXPECTED = {
    "q4_0": (4.5, 0.0070),
    "q4_0, Hadamard": (4.5, 0.0070),
    "q4_1, Hadamard": (5.0, 0.0061),
    "TurboQuant, 4 bits": (4.25, 0.0095),
    "TurboQuant, 3 bits": (3.25, 0.0345),
    "KIVI, 4 bits": (5.0, 0.0061),
    "KIVI, 2 bits": (3.0, 0.16),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_states_are_read_with_the_expected_error_and_bytes(name: str) -> None:
    states = torch.randn(2, 2, 2, 200, 64)
    layer = QUANTISED[name][1](KVConfig("dense", "dense", window=0, sinks=0), *[Channels.natural(2, 64)] * 2, True)
    for part in states.split((130, 70), 3):
        layer.update(*part)
    packed = layer.packed_count(200)
    assert packed == (192 if "KIVI" in name else 200)
    for tokens, own in zip(layer.packed, states[:, :, :, :packed], strict=True):
        error = float((tokens.read(0, packed, torch.float32) - own).square().mean())
        assert error == pytest.approx(EXPECTED[name][1], rel=0.1)
        assert torch.equal(tokens.read(37, 99, torch.float32), tokens.read(0, packed, torch.float32)[:, :, 37:99])
        capacity = tokens.parts["values"].shape[2]
        assert sum(part.nbytes for part in tokens.parts.values()) * 8 / capacity == 2 * 2 * 64 * EXPECTED[name][0]


def test_a_rotation_spreads_an_outlier() -> None:
    states = torch.randn(1, 1, 100, 64)
    states[..., 5] += 50
    errors = {}
    for name in ("q4_0", "q4_0, Hadamard"):
        layer = QUANTISED[name][1](KVConfig("dense", "dense", window=0, sinks=0))
        layer.update(states, states)
        errors[name] = float((layer.packed[0].read(0, 96, torch.float32) - states[:, :, :96]).square().mean())
    assert errors["q4_0, Hadamard"] < 0.5 * errors["q4_0"]


@pytest.mark.parametrize("width", [48, 64, 128])
def test_rotations_are_orthogonal(width: int) -> None:
    for rotation in (RIVALS["hadamard"](width), RIVALS["random_rotation"](width)):
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(width), rtol=0, atol=1e-5)


def test_codes_are_those_of_the_literature() -> None:
    found = RIVALS["lloyd_max"](3)[4:]
    torch.testing.assert_close(found, torch.tensor([0.2451, 0.7560, 1.3439, 2.1520]), rtol=1e-3, atol=1e-3)
