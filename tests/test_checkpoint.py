"""Whole files and resumable states."""

from pathlib import Path

import pytest
import torch

from permprune.checkpoint import Checkpoint, write_json, write_whole
from permprune.errors import PermpruneError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"value": 1})

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(PermpruneError, match=r"cannot write .*No space left on device"):
        write_whole(path, full)
    assert path.read_text() == '{\n  "value": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"seed": 3})
    assert checkpoint.load("newton") is None
    checkpoint.save("newton", {"order": torch.arange(4).flip(0)}, {"round": 2, "best": 3.25})
    tensors, values = Checkpoint(tmp_path, {"seed": 3}).load("newton") or ({}, {})
    assert torch.equal(tensors["order"], torch.tensor([3, 2, 1, 0]))
    assert values == {"round": 2, "best": 3.25}


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"seed": 3, "pattern": "2:4"}).save("newton", {}, {})
    with pytest.raises(PermpruneError, match=r"other settings \(seed\)"):
        Checkpoint(tmp_path, {"seed": 4, "pattern": "2:4"}).load("newton")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "newton.safetensors").write_bytes(b"damaged")
    with pytest.raises(PermpruneError, match=r"newton.safetensors is damaged"):
        Checkpoint(tmp_path, {}).load("newton")


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None, {})
    checkpoint.save("newton", {}, {})
    assert checkpoint.load("newton") is None
