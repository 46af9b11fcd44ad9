"""Runs whose weights and states rest on the disk while they are not used."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune import Evaluation, Newton, PruneConfig
from permprune.checkpoints.record import Record
from permprune.errors import PermpruneError
from permprune.forecasts.machine import Rates
from permprune.permuters.base import Identity
from permprune.system.shelf import Shelf

from ..fixtures import small_checkpoint
from ..held_bytes import Held

RECIPE: dict[str, Any] = {
    "order": Newton(start=Identity(), rounds=2, swaps=2, examples=4), "update": "admm",
    "train": "steps=2:blocks=true",
}  # fmt: skip

SETTINGS = PruneConfig(length=16, samples=24, precision="fp32", recompute=True)


def prune(source: Path, out: Path, text: Path, **settings: Any) -> Record:
    config = SETTINGS.replace(**{"calibration": str(text), **settings})
    return permprune.prune_to_folder(str(source), out, config, evaluation=Evaluation(str(text), 4, 16))


def same_offloaded(source: Path, folder: Path, text: Path, **settings: Any) -> list[Record]:
    """Prune in memory and offloaded, and check that all but the memory is equal; returns both records."""
    records = [prune(source, folder / place, text, offload=place, **settings) for place in ("none", "disk")]
    assert records[1].permutations == records[0].permutations and records[1].gathers == records[0].gathers
    assert records[1].layers == records[0].layers and records[1].measured == records[0].measured
    one, other = (permprune.load(folder / place).state_dict() for place in ("none", "disk"))
    assert one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())
    assert permprune.verify(folder / "disk").layers == len(records[0].layers)
    return records


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "fold"), (torch.bfloat16, "gather")])
def test_nothing_but_the_memory_changes(
    dtype: torch.dtype, mode: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, dtype, num_hidden_layers=2)
    same_offloaded(source, tmp_path, tiny_text, mode=mode, **RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "saliency", "mode", "update"),
    [
        ("none", "wanda", "gather", "admm"),
        ("ria", "ria", "fold", "none"),
        ("cp:escapes=1", "wanda", "gather", "none"),
        ("random", "obs", "gather", "sparsegpt"),
        ("reconstruction", "magnitude", "fold", "none"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_method_finds_or_writes_anything_else(
    family: str,
    method: str,
    saliency: str,
    mode: str,
    update: str,
    tmp_path: Path,
    tiny_text: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Of attention with biases and of a tied embedding, in several files, and of weights that are stored transposed."""
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=128, attention_bias=True, tie_word_embeddings=True, **sizes)
        model: Any = LlamaForCausalLM(config).bfloat16()
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    settings = {"order": method, "saliency": saliency, "mode": mode, "update": update, "exclude": ("*.1.mlp.*",)}
    records = same_offloaded(tmp_path / "source", tmp_path, tiny_text, **settings)
    assert len(records[0].layers) == {"llama": 11, "gpt2": 6}[family]


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("method", "mode", "update", "train"),
    [
        (Newton(start=Identity(), rounds=1, swaps=1, examples=4), "fold", "none", "steps=1"),
        ("ria", "gather", "none", "none"),
        ("ria", "gather", "admm", "none"),
    ],
)
def test_memory_is_what_was_forecast(
    method: str | Newton,
    mode: str,
    update: str,
    train: str,
    tmp_path: Path,
    tiny_text: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("permprune.forecasts.machine._measured_rates", lambda *_: Rates(1e12, 1e12, 1e12, 1e12))
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 512}
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, torch.float32, **sizes)
    recipe: dict[str, Any] = {"order": method, "mode": mode, "update": update, "train": train}
    settings = {**recipe, "batch": 1, "offload": "disk"}
    found = permprune.forecast(str(source), SETTINGS.replace(**settings), windows=4)
    with Held() as held:
        prune(source, tmp_path / "out", tiny_text, **settings)
    assert held.peak == pytest.approx(found.tensors, rel=0.1)
    given = SETTINGS.replace(**recipe)
    for memory, place in ((2**30, "none"), (found.tensors, "disk")):
        assert permprune.forecast(str(source), given.replace(memory=memory), windows=4).config.offload == place


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_are_not_held(
    tmp_path: Path, tiny_text: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permprune.forecasts.machine._measured_rates", lambda *_: Rates(1e12, 1e12, 1e12, 1e12))
    monkeypatch.setattr("permprune.losses.cross_entropy.PROJECTED", 8)
    shape = {"num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 8192, "tie_word_embeddings": True}
    source = small_checkpoint(tmp_path / "source", tiny_tokenizer, torch.float32, **shape)
    config = SETTINGS.replace(calibration=str(tiny_text), order="none", length=128, samples=6, offload="disk")
    found = permprune.forecast(str(source), config, windows=4)
    with Held() as held:
        permprune.prune_to_folder(str(source), tmp_path / "out", config, evaluation=Evaluation(str(tiny_text), 4, 128))
    assert held.peak == pytest.approx(found.tensors, rel=0.1)


@pytest.mark.slow
def test_damaged_weights_are_refused(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path
) -> None:
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    tiny_llama.save_pretrained(tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(PermpruneError, match="up_proj holds NaN or infinite weights"):
        prune(tmp_path / "source", tmp_path / "out", tiny_text, order="ria", offload="disk")


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
    with pytest.raises(PermpruneError, match="leave offload out"):
        permprune.prune_to_folder(tiny_llama, tmp_path / "out", config)
    with pytest.raises(PermpruneError, match="leave offload out"):
        permprune.prune(tiny_llama, config=config)
