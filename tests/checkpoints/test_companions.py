"""What is beside the weights of a checkpoint is beside those of a model made from it."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints import companions

from ..cli.running import run
from ..faults.pruned import SMALL, WINDOWS
from ..fixtures import BLOCK

MODULES = ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
DENSE = {"linear.weight": torch.eye(32), "linear.bias": torch.zeros(32)}
PRUNE = {"order": "random", "precision": "fp32", "examples": WINDOWS}


@pytest.fixture
def sentence_encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text: Path) -> Path:
    """A folder as Sentence-Transformers writes it, with much else in it."""
    folder = tmp_path / "encoder"
    BertModel(BertConfig(**BLOCK, vocab_size=128)).save_pretrained(folder)
    tokens = tiny_tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="</s>").save_pretrained(folder)
    for name in MODULES[1:]:
        (folder / name).mkdir()
    for name in ("1_Pooling", "2_Dense", "3_Dense"):
        (folder / name / "config.json").write_text("{}")
    save_file(DENSE, folder / "2_Dense" / "model.safetensors")
    torch.save(DENSE, folder / "3_Dense" / "pytorch_model.bin")
    listed = [{"idx": place, "name": str(place), "path": path, "type": "a"} for place, path in enumerate(MODULES)]
    (folder / "modules.json").write_text(json.dumps([*listed, {"path": "../outside"}, {"path": "/tmp"}, {"type": "a"}]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    for name in ("onnx", "checkpoint-5", "assets"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    for name in ("onnx/model.onnx", "checkpoint-5/model.safetensors", "pytorch_model.bin", ".env", "README.md"):
        (folder / name).write_bytes(b"not to be copied")
    (folder / "custom.py").write_text("1 / 0")
    (folder / "1_Pooling" / "state.pkl").write_bytes(pickle.dumps(1))
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "assets" / "home").symlink_to(tmp_path)
    (folder / "text.txt").write_text(tiny_text.read_text())
    return folder


COPIED = {
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/config.json", "3_Dense/model.safetensors",
    "4_Normalize", "assets/config.json", "text.txt",
}  # fmt: skip
LEFT = {
    "onnx", "checkpoint-5", "pytorch_model.bin", ".env", "custom.py", "1_Pooling/state.pkl", "secret.txt",
    "assets/home", "3_Dense/pytorch_model.bin", "None",
}  # fmt: skip


def require_companions(folder: Path) -> None:
    assert {name for name in COPIED if not (folder / name).exists()} == set()
    assert {name for name in LEFT if os.path.lexists(folder / name)} == set()
    for name in ("2_Dense", "3_Dense"):
        weights = load_file(folder / name / "model.safetensors")
        assert all(torch.equal(tensor, DENSE[key]) for key, tensor in weights.items())


@pytest.mark.slow
def test_every_command_that_writes_a_model_copies_them(sentence_encoder: Path, tmp_path: Path) -> None:
    text, outside = sentence_encoder / "text.txt", set(tmp_path.parent.iterdir())
    labelled = tmp_path / "labelled.tsv"
    labelled.write_text("sentence\tlabel\n" + "".join(f"a film {n}\t{n % 2}\n" for n in range(40)))
    shared = ["--calibration", text, "--data", text, "--samples", "12", *SMALL]
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    code, _, stderr = run("prune", sentence_encoder, *shared, "--order", "ria", "--out", pruned)
    assert code == 0, stderr
    said = " ".join(stderr.split())
    assert all(name in said for name in ("custom.py", "1_Pooling/state.pkl", "secret.txt", "onnx", "checkpoint-5"))
    for arguments in (
        ["finetune", sentence_encoder, "--data", labelled, "--epochs", "1", "--train", "head"],
        ["pack", pruned],
    ):
        out = packed if arguments[0] == "pack" else tmp_path / f"{arguments[0]} {arguments[1].name}"
        code, _, stderr = run(*arguments, "--out", out)
        assert code == 0, stderr
        require_companions(out)
    assert run("unpack", packed, "--out", tmp_path / "unpacked")[0] == 0
    require_companions(tmp_path / "unpacked")
    require_companions(pruned)
    assert "not to be copied" not in (pruned / "README.md").read_text()
    assert set(tmp_path.parent.iterdir()) == outside, "nothing is written outside of --out"


def test_files_of_a_hub_id_come_from_the_cache(
    sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "hub" / "models--someone--encoder"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(sentence_encoder.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            link = home / "snapshots" / ("0" * 40) / path.relative_to(sentence_encoder)
            link.parent.mkdir(parents=True, exist_ok=True)
            path.rename(home / "blobs" / str(number))
            link.symlink_to(home / "blobs" / str(number))
    (link.parent / "secret.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer, _ = permprune.read_model("someone/encoder")
    permprune.prune(model, tokenizer, **PRUNE).save_pretrained(tmp_path / "out", tokenizer)
    (tmp_path / "out" / "4_Normalize").mkdir(exist_ok=True)  # git and the hub have no empty folders
    require_companions(tmp_path / "out")


def test_of_a_hub_id_only_these_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = COPIED - {"4_Normalize", "3_Dense/model.safetensors"} | {"3_Dense/pytorch_model.bin"}
    left = ["custom.py", "pytorch_model.bin", "model.safetensors", ".env", "onnx/model.onnx", "onnx/config.json"]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path} for path in MODULES]))
    fetched: list[str] = []

    def download(hub_id: str, name: str, revision: str) -> str:
        fetched.append(name)
        return str(tmp_path / name)

    found: Any = SimpleNamespace(
        sha="0", siblings=[SimpleNamespace(rfilename=name) for name in [*copied, *left, "README.md"]]
    )
    monkeypatch.setattr(companions.HfApi, "model_info", lambda self, hub_id: found)
    monkeypatch.setattr(companions, "hf_hub_download", download)
    companions.fetch_companions("someone/encoder")
    assert {*fetched} == copied | {"README.md"}
