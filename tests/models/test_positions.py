"""Models with fewer positions than the length asked for: it is clipped, and one line says so."""

import json
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from permprune.models.modality import positions_of

from ..cli.running import run
from ..fixtures import BLOCK, SENTENCES


@pytest.fixture
def short_gpt2(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A language model of 24 positions, whose table has no more rows."""
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_positions() -> None:
    assert positions_of(RobertaModel(RobertaConfig(**BLOCK, vocab_size=64, max_position_embeddings=34))) == 32
    assert positions_of(BertForSequenceClassification(BertConfig(**BLOCK, vocab_size=64))) == 512
    assert positions_of(T5Model(T5Config(vocab_size=64, d_model=16, num_layers=1))) is None


FEW = ["--samples", "6", "--windows", "1"]
COMMANDS: dict[str, list[str]] = {
    "prune": ["--calibration", "DATA", *FEW, "--order", "none", "--out", "OUT"],
    "compare": ["--calibration", "DATA", *FEW, "--methods", "none", "--patterns", "2:4", "--out", "OUT"],
    "evaluate": ["--windows", "1"],
    "finetune": ["--epochs", "1", "--rows", "8", "--out", "OUT"],
    "kv": ["--calibration", "DATA", "--samples", "1", "--windows", "1", "--out", "OUT"],
    "plan": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_length_is_clipped_to_the_positions(
    command: str, short_gpt2: Path, tiny_text: Path, tmp_path: Path
) -> None:
    named = {"DATA": tiny_text, "OUT": tmp_path / "out"}
    given = [named.get(option, option) for option in COMMANDS[command]]
    data = [] if command == "plan" else ["--data", tiny_text]
    code, stdout, stderr = run(command, short_gpt2, *data, *given)
    said = " ".join((stderr + stdout).split())
    assert code == 0, stderr
    assert said.count("the model has 24 positions: the length is 24 tokens in place of 512") == 1, stderr
    if command == "prune":
        assert json.loads((tmp_path / "out" / "permprune.json").read_text())["settings"]["length"] == 24


@pytest.mark.slow
def test_sentences_are_cut_at_the_positions(tmp_path: Path, tiny_bert: Path) -> None:
    """Also where the tokenizer would take more."""
    config = BertConfig(**BLOCK, vocab_size=128, max_position_embeddings=16, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tiny_bert)
    rows = [{"sentence": f"{SENTENCES[number % 4]} {number}" * 9, "label": number % 3} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, stderr = run("evaluate", tiny_bert, "--data", tmp_path / "rows.jsonl", "--windows", "1")
    assert code == 0 and "the model has 16 positions" in " ".join(stderr.split()), stderr
