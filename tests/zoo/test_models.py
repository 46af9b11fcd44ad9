import json
import logging

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.zoo.models import MODELS, resolve_model


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


def test_every_entry_says_what_it_is():
    for entry in MODELS.values():
        assert len(entry.package.sha256) == 64
        assert entry.package.license
        assert entry.note


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
