"""Model cards: what they say, and the metadata that the hub reads."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.companions import base_model_of, licence_of
from permprune.checkpoints.record import Record
from permprune.report.card import hub_card, loading_code, next_steps, render_card, write_card

from ..cli.running import run
from ..faults.pruned import SETTINGS, WINDOWS, options, write_source
from ..records import record_of

CONFIG = {"architectures": ["LlamaForCausalLM"]}
MEASURED = {"data": "text.txt", "metric": "perplexity", "dense": 30.0, "none": 60.0, "pruned": 40.0, "count": 1200}


def card_of(source: str = "out", on_hub: bool = False, config: dict[str, Any] = CONFIG, **fields: Any) -> ModelCard:
    return ModelCard(render_card(record_of(**fields).to_json(), config, source, on_hub=on_hub))


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.slow
def test_a_run_writes_a_card(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", tiny_tokenizer), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Small\n", encoding="utf-8")
    assert run("prune", source, *options(source), "--order", "ria", "--out", out)[0] == 0
    card = card_in(out)
    assert card.data.license == "mit" and card.data.base_model is None and card.data.library_name == "transformers"
    assert card.data.tags == ["permprune", "pruning", "sparsity", "2:4"]
    record = json.loads((out / "permprune.json").read_text())
    assert 'model = LlamaForCausalLM.from_pretrained("out")' in card.text and "plain checkpoint" in card.text
    for line in ("| mode | `fold` |", "| order | `ria` |", "| saliency | `wanda` |", "| calibration | `text.txt` |"):
        assert line in card.text
    assert "| perplexity | " in card.text and "of text.txt." in card.text and str(tmp_path) not in card.text
    assert f"Measured on {record['measured']['count']:,} tokens" in card.text
    small = ["--epochs", "1", "--rows", "16", "--length", "16"]
    assert run("finetune", out, "--data", source / "text.txt", *small, "--out", tmp_path / "tuned")[0] == 0
    tuned = card_in(tmp_path / "tuned")
    assert "Trained after that" in tuned.text and tuned.data.license == "mit"
    assert run("pack", out, "--dtype", "fp32", "--out", tmp_path / "packed")[0] == 0
    packed = card_in(tmp_path / "packed")
    assert "import permprune  # with it, Transformers loads packed weights\nfrom transformers" in packed.text


def test_commands_to_go_on_with_take_any_name_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out of 2:4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    said = next_steps(record_of().to_json(), folder)
    assert shlex.split(said.splitlines()[0], comments=True) == ["permprune", "verify", str(folder)]


def test_every_way_to_save_writes_a_card(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.config.name_or_path = "someone/small-model"
    pruned = permprune.prune(tiny_llama, examples=WINDOWS, mode="gather", **SETTINGS)
    pruned.save_pretrained(tmp_path / "one")
    permprune.save(pruned.model, tmp_path / "two")
    for folder in ("one", "two"):
        card = card_in(tmp_path / folder)
        assert card.data.base_model == "someone/small-model" and card.data.library_name == "permprune"
        assert card.data.license is None and "license" not in card.content
        assert f'model = permprune.load("{folder}")' in card.text and "gather mode" in card.text
        assert "the network was not measured" in card.text
    again = permprune.prune(permprune.load(tmp_path / "one"), examples=WINDOWS, **{**SETTINGS, "order": "none"})
    assert again.record().base_model == "someone/small-model"


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_the_code_on_the_card_loads_the_model(tiny_llama: LlamaForCausalLM, tmp_path: Path, mode: str) -> None:
    permprune.prune(tiny_llama, examples=WINDOWS, mode=mode, **SETTINGS).save_pretrained(tmp_path / mode)
    code = card_in(tmp_path / mode).text.split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace(f'"{mode}"', repr(str(tmp_path / mode))), found)
    assert isinstance(found["model"], LlamaForCausalLM)


def test_what_the_hub_reads_is_what_is_known() -> None:
    card = card_of(base_model="someone/small-model", license="apache-2.0", measured={**MEASURED, "unit": "tokens"})
    assert (card.data.base_model, card.data.license) == ("someone/small-model", "apache-2.0")
    assert "This is `someone/small-model`, pruned to N:M" in card.text
    own = card_of("me/small", True, {"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}})
    assert 'AutoModelForCausalLM.from_pretrained("me/small", trust_remote_code=True)' in own.text
    encoder = card_of(config={"architectures": ["BertModel"], "sentence_pooling": "mean"})
    assert 'model = SentenceTransformer("out")' in encoder.text and "BertModel" not in encoder.text
    assert "model.encode([" in encoder.text and "Processor" not in encoder.text
    recogniser = card_of(config={"architectures": ["WhisperForConditionalGeneration"]})
    assert "model.generate(**processor(" in recogniser.text and "model(**" not in recogniser.text
    strange = card_of(model="/home/me/a|`b`\n# <b>", settings={"pattern": "2:4", "order": "a|`b", "update": "none"})
    assert strange.text.startswith("\n# a\\|\\`b\\` \\# \\<b\\>, 2:4\n") and "/home" not in strange.text
    assert "This is `a\\| b # <b>`, pruned" in strange.text and "| order | `a\\| b` |" in strange.text


def test_the_card_of_an_encoder_names_it_on_the_hub_by_its_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "sentence_pooling": "mean"}))
    record = record_of().to_json()
    write_card(record, tmp_path)
    card = hub_card(record, tmp_path, "someone/encoder")
    assert card is not None and 'SentenceTransformer("someone/encoder")' in card


def test_licences_come_from_the_base_models_card_or_config(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert licence_of("smollm2-135m") == "apache-2.0"
    assert licence_of("someone/never-downloaded") is None and licence_of("LlamaForCausalLM") is None
    tiny_llama.save_pretrained(tmp_path)
    assert licence_of(str(tmp_path)) is None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "license": "Apache-2.0"}))
    assert licence_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [mit]\n---\n")
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: {\n---\n")
    assert licence_of(str(tmp_path)) == "apache-2.0" and "its metadata cannot be read" in caplog.text
    names = ("someone/model", "gpt2", "smollm2-135m", "LlamaForCausalLM", str(tmp_path), "./here", "a/b/c")
    assert [base_model_of(tiny_llama, name) for name in names] == ["someone/model", "gpt2", *[None] * 5]


def test_a_record_without_them_is_read() -> None:
    values = record_of().to_json()
    del values["license"], values["base_model"]
    assert Record.of(values) == record_of()
    assert dataclasses.replace(record_of(), license="mit").to_json()["license"] == "mit"


def test_a_card_says_whether_weights_changed() -> None:
    dense = "have the values that they have in the dense model."
    for stages, kept, text in (
        (["training"], True, "were changed by training."),
        (["training"], False, dense),
        (["search"], True, dense),
        (["blocks", "training"], True, "were changed by training."),
        (["compensation", "blocks"], True, "were changed by compensation and training."),
    ):
        curve = [{"round": 1, "loss": 1.0, "seconds": 1.0, "kept": kept, "stage": stage} for stage in stages]
        assert f"The weights that are kept {text}" in str(card_of(curve=curve))
    tuned = {"metric": "perplexity", "before": 40.0, "after": 35.0, "stderr": None, "dense": None, "curve": []}
    tuned |= {"examples": 9, "count": 99, "unit": "tokens"}
    for train, text in (("all", "were changed by training."), ("norms", dense)):
        card = str(card_of(optimised={**tuned, "train": train}, measured={**MEASURED, "unit": "tokens"}))
        assert f"The weights that are kept {text}" in card and "of the model before it was trained." in card


@pytest.mark.parametrize(
    ("dtype", "loaded", "encoder"),
    [
        ("int8, packed, run in bf16", ', dtype="bfloat16"', ', model_kwargs={"dtype": "bfloat16"}'),
        ("int8, packed", "", ""),
    ],
)
def test_a_packed_model_is_loaded_in_the_type_of_its_speed(dtype: str, loaded: str, encoder: str) -> None:
    record = {"gathers": {}, "showcase": {"sides": {"pruned": {"dtype": dtype}}}}
    config = {"architectures": ["LlamaForCausalLM"]}
    assert f'LlamaForCausalLM.from_pretrained("out"{loaded})' in loading_code(record, config, "out")
    pooled = loading_code(record, {**config, "sentence_pooling": "mean"}, "out")
    assert f'SentenceTransformer("out"{encoder})' in pooled
