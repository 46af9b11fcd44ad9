"""Models in huge pages: the same numbers, shared as before, and nothing where it would not help."""

import copy
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import permprune
from permprune.system.memory import HUGE, move_to_huge_pages


class Model(nn.Module):
    """Two linear layers with one weight, a buffer, and a buffer that is a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("whole", torch.arange(width))
        self.register_buffer("part", self.whole[1:3])
        self.register_buffer("none", torch.zeros(0))


def test_a_model_moves_and_stays_what_it_is() -> None:
    model = Model(1024)
    expected = copy.deepcopy(model)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    move_to_huge_pages(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.state_dict().items())
    moved = {name for name, tensor in after.items() if tensor.data_ptr() != before[name]}
    assert moved == ({"first.weight", "first.bias", "second.weight"} if hasattr(mmap, "MADV_HUGEPAGE") else set())
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    model.first.weight.data[0, 0] = 7
    model.whole[1] = 7
    assert model.second.weight[0, 0] == 7 and model.part[0] == 7
    assert copy.deepcopy(model).second.weight[0, 0] == 7
    assert all(tensor.data_ptr() % 64 == 0 for name, tensor in after.items() if name in moved)


def test_the_old_memory_is_given_back() -> None:
    old = torch.zeros(HUGE, dtype=torch.uint8)
    alive = weakref.ref(old)
    model = nn.Module()
    model.register_buffer("buffer", old.view(2, -1))
    model.shared = nn.Module()
    model.shared.register_buffer("buffer", model.buffer)
    del old
    move_to_huge_pages(model)
    assert model.buffer.data_ptr() == model.shared.buffer.data_ptr()
    assert alive() is None or not hasattr(mmap, "MADV_HUGEPAGE")


def test_small_models_stay_where_they_are() -> None:
    model = nn.Linear(64, 64)
    before = model.weight.data_ptr()
    move_to_huge_pages(model)
    assert model.weight.data_ptr() == before


def test_a_moved_model_is_saved_and_loaded(tmp_path: Path, tiny_llama: nn.Module) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size, config.intermediate_size = 256, 1024
    model = type(tiny_llama)(config)
    expected = copy.deepcopy(model.state_dict())
    move_to_huge_pages(model)
    model.save_pretrained(tmp_path)
    found, _, _ = permprune.read_model(str(tmp_path))
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())


def test_where_there_are_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    model = nn.Linear(1024, 1024)
    before = model.weight.data_ptr()
    move_to_huge_pages(model)
    assert model.weight.data_ptr() == before
