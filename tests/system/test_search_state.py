"""Resumable states."""

from dataclasses import dataclass, field
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


@pytest.mark.parametrize("damaged", ["tensors", "values", "all"])
def test_a_damaged_state_is_named(tmp_path: Path, damaged: str) -> None:
    Checkpoint(tmp_path, {}).save("newton", {"rate": torch.full((4,), 0x21, dtype=torch.uint8)}, {"best": 2.31})
    path, changes = tmp_path / "newton.safetensors", {"tensors": (b"!!!!", b"!?!!"), "values": (b"2.31", b"1.31")}
    path.write_bytes(path.read_bytes().replace(*changes.get(damaged, (path.read_bytes(), b"damaged"))))
    with pytest.raises(PermpruneError, match=r"newton.safetensors is damaged"):
        Checkpoint(tmp_path, {}).load("newton")


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None, {})
    checkpoint.save("newton", {}, {})
    assert checkpoint.load("newton") is None


@dataclass(frozen=True)
class Step:
    order: torch.Tensor
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    best: float
    orders: dict[str, torch.Tensor]
    steps: tuple[Step, ...]
    factors: dict[str, float] = field(default_factory=dict)


def test_a_dataclass_object_comes_back_as_it_was(tmp_path: Path) -> None:
    order = torch.arange(4).flip(0)
    progress = Progress(0.1 + 0.2, {"a/b": order}, (Step(order, (0, 2)), Step(order + 1, ())), {"a/b": 1e-30})
    checkpoint = Checkpoint(tmp_path, {})
    assert checkpoint.load_object("newton", Progress) is None
    checkpoint.save_object("newton", progress)
    again = checkpoint.load_object("newton", Progress)
    assert again is not None and (again.best, again.factors) == (progress.best, progress.factors)
    assert torch.equal(again.orders["a/b"], order) and [step.rounds for step in again.steps] == [(0, 2), ()]
    assert all(torch.equal(step.order, order + number) for number, step in enumerate(again.steps))


def test_a_state_of_another_form_is_refused(tmp_path: Path) -> None:
    """Such as that of an earlier version."""
    Checkpoint(tmp_path, {}).save("newton", {"order": torch.arange(4)}, {"done": 2, "own": {"rate": 0.5}})
    with pytest.raises(PermpruneError, match=r"newton.safetensors is damaged"):
        Checkpoint(tmp_path, {}).load_object("newton", Progress)
