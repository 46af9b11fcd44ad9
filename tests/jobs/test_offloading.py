"""Runs whose weights and states rest on the disk while they are not used."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune import Evaluation, Identity, Newton, PruneConfig
from permprune.checkpoints.record import Record
from permprune.errors import PermpruneError
from permprune.forecasts.machine import Rates
from permprune.system.shelf import Shelf

from ..fixtures import small_checkpoint
from .test_streaming import Held

METHOD = Newton(start=Identity(), rounds=2, swaps=2, examples=4, refine=1, compensate=True, train_steps=2)

SETTINGS = PruneConfig(length=16, samples=24, precision="fp32", recompute=True)


def prune(source: Path, out: Path, text: Path, **settings: Any) -> Record:
    config = SETTINGS.replace(**{"permute": METHOD, "calibration": str(text), **settings})
    return permprune.prune_to_folder(str(source), out, config, evaluation=Evaluation(str(text), 4, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "fold"), (torch.bfloat16, "gather")])
def test_nothing_but_the_memory_changes(
    dtype: torch.dtype, mode: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, dtype, num_hidden_layers=2)
    records = [prune(source, tmp_path / place, tiny_text, offload=place, mode=mode) for place in ("none", "disk")]
    assert records[1].permutations == records[0].permutations and records[1].gathers == records[0].gathers
    assert records[1].measured == records[0].measured
    one, other = (permprune.load(tmp_path / place).state_dict() for place in ("none", "disk"))
    assert one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())
    assert permprune.verify(tmp_path / "disk").layers == 14


@pytest.mark.slow
def test_memory_is_what_was_forecast(
    tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks that are as small beside the tiny model as beside real ones."""
    for module in ("permuters.bundles", "permuters.reconstruction", "forecasts.costs"):
        monkeypatch.setattr(f"permprune.{module}.BLOCK", 2**12)
    monkeypatch.setattr("permprune.forecasts.machine._measured_rates", lambda *_: Rates(1e12, 1e12, 1e12, 1e12))
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256}
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, torch.float32, **sizes)
    method = Newton(start=Identity(), rounds=1, swaps=1, examples=4, train_steps=1)
    settings = {"permute": method, "batch": 1, "offload": "disk"}
    found = permprune.forecast(str(source), SETTINGS.replace(**settings), windows=4)
    with Held() as held:
        prune(source, tmp_path / "out", tiny_text, **settings)
    assert held.peak == pytest.approx(found.tensors, rel=0.1)
    least = permprune.forecast(str(source), SETTINGS.replace(**settings, memory=found.tensors)).config
    assert least.offload == "disk"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf = Shelf("disk", tmp_path)
    shelf["kept"] = torch.ones(3)
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(PermpruneError, match="No space left on device; free space"):
        shelf["more"] = torch.ones(3)
    assert shelf["kept"].tolist() == [1, 1, 1]


def test_only_a_model_that_is_read_is_offloaded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    config = PruneConfig(offload="disk")
    with pytest.raises(PermpruneError, match="leave --offload out"):
        permprune.prune_to_folder(tiny_llama, tmp_path / "out", config)
    with pytest.raises(PermpruneError, match="leave offload out"):
        permprune.prune(tiny_llama, config=config)
