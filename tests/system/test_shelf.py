"""Shelves at each place hold what was put there."""

from pathlib import Path

import pytest
import torch

from permprune.system.shelf import Place, Shelf, read_tensors, write_tensors


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_is_put_back_is_kept(place: Place, tmp_path: Path) -> None:
    shelf = Shelf(place, tmp_path)
    for name, tensor in {
        "a": torch.rand(3, 5),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
    }.items():
        shelf[name] = tensor
    before = shelf["a"].clone()
    shelf["a"] += 1
    assert torch.equal(shelf["a"], before + 1) and shelf["b"].dtype == torch.bfloat16 and shelf["c"].shape == (0, 4)
    shelf["a"] = torch.rand(7)
    assert shelf["a"].shape == (7,) and len(shelf) == 3 and not len(shelf.another())
    del shelf["a"]
    assert "a" not in shelf and [*shelf] == ["b", "c"]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_a_mask_keeps_is_kept_and_can_be_put_aside(place: Place, tmp_path: Path) -> None:
    mask = torch.rand(6, 8) > 0.5
    whole, kept = Shelf(place, tmp_path), Shelf(place, tmp_path).another({"a": mask})
    for shelf in (whole, kept):
        shelf["a"] = torch.rand(6, 8)
        shelf["a"] += 1
    value = whole["a"].clone()
    assert int((kept["a"] > 1).sum()) == (48 if place == "device" else int(mask.sum()))
    assert kept.resting("a").numel() == int((kept["a"] != 0).sum())
    whole.put_aside()
    assert torch.equal(whole["a"], value) and whole.place == ("device" if place == "device" else "disk")


def test_a_tensor_in_use_does_not_change_with_what_takes_its_name(tmp_path: Path) -> None:
    shelf = Shelf("disk", tmp_path)
    shelf["a"] = torch.ones(3)
    used = shelf["a"]
    shelf["a"] = torch.zeros(5)
    assert used.tolist() == [1, 1, 1] and not any(tmp_path.iterdir())


def test_files_hold_tensors_of_every_type_and_place(tmp_path: Path) -> None:
    shelf = Shelf("disk", tmp_path)
    tensors = {"b": torch.tensor(True), "i": torch.arange(3), "w": torch.rand(4, 2).T, "h": torch.rand(3).bfloat16()}
    shelf.update(tensors)
    write_tensors(tmp_path / "saved.safetensors", shelf, {"key": "value"})
    read, metadata = read_tensors(tmp_path / "saved.safetensors")
    assert metadata == {"key": "value"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
