"""Resumable states."""

from pathlib import Path

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.system.search_state import Checkpoint


def test_a_state_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"seed": 3})
    assert checkpoint.load("newton") is None
    checkpoint.save("newton", {"order": torch.arange(4).flip(0)}, {"round": 2, "best": 3.25})
    tensors, values = Checkpoint(tmp_path, {"seed": 3}).load("newton") or ({}, {})
    assert torch.equal(tensors["order"], torch.tensor([3, 2, 1, 0]))
    assert values == {"round": 2, "best": 3.25}


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"seed": 3, "pattern": "2:4"}).save("newton", {}, {})
    with pytest.raises(PermpruneError, match="another seed: use the same"):
        Checkpoint(tmp_path, {"seed": 4, "pattern": "2:4"}).load("newton")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "newton.safetensors").write_bytes(b"damaged")
    with pytest.raises(PermpruneError, match=r"newton.safetensors is damaged"):
        Checkpoint(tmp_path, {}).load("newton")


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None, {})
    checkpoint.save("newton", {}, {})
    assert checkpoint.load("newton") is None
