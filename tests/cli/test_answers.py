"""The command line on prompts with answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration

import permprune

from ..conversations import turns, with_template, write_answers, write_rows
from ..fixtures import BLOCK
from .running import fails, run

SMALL = ["--samples", "12", "--windows", "6", "--length", "64"]
NEWTON = ["--order", "newton:start=ria:rounds=1", "--update", "admm", "--train", "steps=2"]


@pytest.fixture
def chatty(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random Qwen2 and a tokenizer with a chat template."""
    folder = tmp_path / "chatty"
    config = Qwen2Config(**BLOCK, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    with_template(tiny_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_encoder_decoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "t5"
    config = T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write_answers(tmp_path / "answers.jsonl", 30)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    words = ["two", "of", "every", "four"]
    rows = [{"messages": turns(f"which {i}", words[i % 4], "so " * (i % 3), words[-i % 4])} for i in range(9)]
    return write_rows(tmp_path / "talks.jsonl", list[dict[str, object]](rows))


@torch.no_grad()
def measured(folder: Path, talks: Path) -> float:
    """The perplexity of the answers, computed text by text."""
    model, tokenizer, _ = permprune.read_model(str(folder))
    losses, tokens = 0.0, 0
    for line in talks.read_text().splitlines():
        given = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(given, return_tensors="pt", return_dict=True)["input_ids"]
        shares = model(ids).logits[0].log_softmax(1)
        for number in (1, 3):
            before = tokenizer.apply_chat_template(given[:number], add_generation_prompt=True)["input_ids"]
            until = tokenizer.apply_chat_template(given[: number + 1])["input_ids"]
            places = torch.arange(len(before), len(until) if until[-1] == 2 else len(until) - 1)
            losses -= float(shares[places - 1, ids[0, places]].sum())
            tokens += len(places)
    return float(torch.tensor(losses / tokens).exp())


def figures(*arguments: Any) -> dict[str, Any]:
    """What a command writes with --json."""
    out = Path(arguments[1]).parent / "figures.json"
    code, _, stderr = run(*arguments, "--json", out)
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_evaluate_measures_the_answers(chatty: Path, talks: Path) -> None:
    found = figures("evaluate", chatty, "--data", talks, "--length", "64")
    assert found["value"] == pytest.approx(measured(chatty, talks), rel=1e-4)


def test_prune_on_answers_and_text(chatty: Path, answers: Path, talks: Path, tiny_text: Path, tmp_path: Path) -> None:
    data = ["--calibration", answers, "--calibration", tiny_text, "--data", talks]
    code, _, stderr = run("prune", chatty, *data, *SMALL, *NEWTON, "--out", tmp_path / "out")
    assert code == 0, stderr
    assert "".join(stderr.split()).count(f"{answers}:of6rows,1cutafter64tokens") == 1
    record = json.loads((tmp_path / "out/permprune.json").read_text())
    assert record["settings"]["calibration"] == [str(answers), str(tiny_text)]
    found = figures("evaluate", tmp_path / "out", "--data", talks, "--length", "64")
    assert found["value"] == pytest.approx(measured(tmp_path / "out", talks), rel=1e-4)
    assert run("verify", tmp_path / "out")[0] == 0


def test_models_without_causal_attention_are_refused(tiny_encoder_decoder: Path, answers: Path) -> None:
    line = fails("evaluate", tiny_encoder_decoder, "--data", answers)
    assert line.endswith(
        "has prompts with answers, and T5ForConditionalGeneration is no causal language model: give text"
    )


@pytest.mark.slow
def test_offloaded_the_same_is_pruned(chatty: Path, answers: Path, tmp_path: Path) -> None:
    data = ["--calibration", answers, "--data", answers, *SMALL, "--order", "newton:rounds=1"]
    for place in ("none", "disk"):
        code, _, stderr = run("prune", chatty, *data, "--set", f"offload={place}", "--out", tmp_path / place)
        assert code == 0, stderr
    held, offloaded = (json.loads((tmp_path / place / "permprune.json").read_text()) for place in ("none", "disk"))
    assert held["permutations"] == offloaded["permutations"]


@pytest.mark.slow
def test_training_lowers_the_loss_of_answers_and_keeps_the_zeros(
    chatty: Path, answers: Path, talks: Path, tmp_path: Path
) -> None:
    data = ["--calibration", answers, "--data", talks]
    assert run("prune", chatty, *data, *SMALL, "--order", "ria", "--out", tmp_path / "out")[0] == 0
    tuning = ["--data", answers, "--dev", answers, "--length", "64", "--epochs", "3", "--lr", "0.005"]
    code, _, stderr = run("finetune", tmp_path / "out", *tuning, "--teacher", chatty, "--out", tmp_path / "tuned")
    assert code == 0, stderr
    tuned = json.loads((tmp_path / "tuned/permprune.json").read_text())["optimised"]
    assert tuned["metric"] == "perplexity" and tuned["after"] < 0.95 * tuned["before"]
    assert run("verify", tmp_path / "tuned")[0] == 0


@pytest.mark.slow
def test_a_cache_is_calibrated_on_answers(chatty: Path, answers: Path, tmp_path: Path) -> None:
    data = ["--calibration", answers, "--data", answers, "--samples", "6", "--windows", "6", "--length", "64"]
    code, _, stderr = run("kv", chatty, *data, "--out", tmp_path / "kv")
    assert code == 0, stderr
    dense = figures("evaluate", chatty, "--data", answers, "--length", "64", "--windows", "6")
    record = json.loads((tmp_path / "kv/kv.json").read_text())
    assert record["measured"]["dense"] == pytest.approx(dense["value"], rel=1e-5)
