"""Shelves at each place hold what was put there."""

from pathlib import Path

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.system.shelf import Place, Room, Shelf, empty_on_host, picked, read_tensors, spread, write_tensors

from ..simulated_device import CPU, SIMULATED, simulated_device


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


def test_room_is_taken_on_the_device_then_on_the_host_then_on_the_disk(tmp_path: Path) -> None:
    with simulated_device():
        size, room = 4 * 100, Room(device=400, host=800)
        first = Shelf("host", tmp_path, room=room)
        tensors = {name: torch.rand(100) for name in "abcdef"}
        first.update((name, tensors[name].to(SIMULATED)) for name in "abc")
        assert [first.resting(name).device for name in "abc"] == [SIMULATED, CPU, CPU]
        assert room.lease(1).place == "disk"
        second = first.another()
        first.put_aside()  # what is on the device has no room on the host
        second["d"] = tensors["d"].to(SIMULATED)
        assert second.resting("d").device == SIMULATED and first.resting("b").device == CPU
        second["e"] = tensors["e"].to(SIMULATED)  # for which what is aside makes room
        assert room.lease(size).place == "host" and room.lease(2 * size).place == "disk"
        del second["d"]
        second["f"] = tensors["f"].to(SIMULATED)
        assert second.resting("f").device == SIMULATED
        for name, shelf in {**dict.fromkeys("abc", first), **dict.fromkeys("ef", second)}.items():
            assert shelf[name].device == SIMULATED and torch.equal(shelf[name].cpu(), tensors[name])


def test_reserved_room_is_not_taken_while_blocks_are_updated() -> None:
    room = Room(device=400, reserved=300)
    with room.without_reserved():
        assert [room.lease(size).place for size in (100, 101)] == ["device", "host"]
    assert [room.lease(size).place for size in (400, 401)] == ["device", "host"]


def test_pinned_memory_is_as_large_as_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            registered[address] = size
            return int(size > 2**12)

        def cudaHostUnregister(self, address: int) -> int:
            return registered.pop(address) * 0

    monkeypatch.setattr("torch.cuda.cudart", Runtime)
    device = torch.device("cuda")
    tensor = empty_on_host(torch.ones(3, 33, dtype=torch.bfloat16), device)
    assert registered == {tensor.data_ptr(): 2 * 99} and tensor.fill_(2).shape == (3, 33)
    view = tensor[1]
    del tensor
    assert registered
    del view
    assert not registered
    with pytest.raises(PermpruneError, match="--set offload=disk"):
        empty_on_host(torch.ones(2**12), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_elements_are_picked_and_spread_as_by_torch(
    dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permprune.system.shelf.PLACED", 7)
    tensor, mask = torch.randn(9, 11).to(dtype), torch.rand(9, 11) > 0.4
    if transposed:
        tensor, mask = tensor.T, mask.T
    elements = picked(tensor, mask)
    assert torch.equal(elements, tensor[mask])
    assert torch.equal(spread(elements, mask), torch.where(mask, tensor, 0))
