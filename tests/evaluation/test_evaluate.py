"""Accuracy, agreement, word error rate and the choice among them."""

import copy
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from permprune.config import PruneConfig
from permprune.engine.held import prepare, prune
from permprune.errors import PermpruneError
from permprune.evaluation.agreement import agreement, dense_outputs
from permprune.evaluation.dispatch import evaluate_model
from permprune.evaluation.metrics import accuracy
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.speech import word_error_rate
from permprune.examples import Examples

from ..conversations import padded_answers
from ..modalities import EXAMPLES, draw, images, make, sentences, speech
from ..processes import in_processes


@pytest.mark.parametrize("batch", [1, 5, 64])
@torch.no_grad()
def test_accuracy_is_the_share_of_right_labels(batch: int) -> None:
    model = make("vit")
    examples = images()
    said = model(pixel_values=examples["pixel_values"]).logits.argmax(1)
    labels = torch.where(torch.arange(12) < 9, said, (said + 1) % 5)
    result = accuracy(model, Examples({**examples, "labels": labels}), batch)
    assert (result.metric.name, result.value, result.count) == ("top-1 accuracy", 0.75, 12)
    assert result.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 12))
    assert json.loads(json.dumps(result.to_json()))["value"] == 0.75


@torch.no_grad()
def test_positions_without_a_label_do_not_count() -> None:
    model, examples = make("whisper"), speech()
    right, counted = model(**examples).logits.argmax(-1) == examples["labels"], examples["labels"].ne(-100)
    result = accuracy(model, examples)
    assert result.count == int(counted.sum())
    assert result.value == pytest.approx(float(right[counted].float().mean()))


@pytest.mark.parametrize("data", EXAMPLES)
def test_a_model_agrees_with_itself_and_less_when_pruned(data: str) -> None:
    examples = EXAMPLES[data]()
    pruned = prune(make(data), order="ria", examples=examples, precision="fp32", measured=4, held_out=2).model
    same, changed = agreement(make(data), examples, make(data)), agreement(pruned, examples, make(data))
    if data == "headless":
        assert same[0].metric.name == "feature error" and same[0].value == 0
        assert 0.1 < changed[0].value < 3
    else:
        assert [result.metric.name for result in same] == ["top-1 agreement", "KL divergence"]
        assert same[0].value == 1 and same[1].value < 1e-3
        assert changed[0].value < 1 and changed[1].value > 0.01


def test_agreement_measures_a_network_that_shows_other_weights() -> None:
    examples = sentences(labels=False)
    prepared = prepare(make("bert"), None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=examples)
    with prepared.network.dense_weights():
        answers = dense_outputs(prepared.model, examples)
    shown = agreement(prepared.model, examples, answers)
    assert shown == agreement(prepared.model, examples, make("bert"))
    assert shown == evaluate_model(prepared.model, examples, dense=answers)
    assert shown[0].count == 12 and shown[1].value > 0.01


def test_nothing_to_count_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    nothing = torch.full((12,), -100)
    with pytest.raises(PermpruneError, match="no example has a label"):
        accuracy(make("vit"), Examples({**images(), "labels": nothing}))
    ids = draw(64, 3, 8)
    with pytest.raises(PermpruneError, match="no tokens to predict"):
        perplexity(tiny_llama, Examples({"input_ids": ids, "attention_mask": torch.zeros_like(ids)}))


def test_words_are_counted_as_a_model_says_them(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, examples = make("whisper"), speech()
    model.generation_config.eos_token_id = model.config.eos_token_id = 63
    inputs = {"input_features": examples["input_features"]}
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)
    right = Examples({**inputs, "labels": said[:, -12:]})
    texts = tiny_tokenizer.batch_decode(said, skip_special_tokens=True)
    (result,) = evaluate_model(model, right, tiny_tokenizer)
    assert (result.metric.name, result.value, result.stderr) == ("word error rate", 0, 0)
    assert result.count >= len([text for text in texts if text.strip()])
    wrong = evaluate_model(model, Examples({**inputs, "labels": said[:, -12:].roll(1, 0)}), tiny_tokenizer)[0]
    assert wrong.value > 0 and wrong.stderr is not None and wrong.count == result.count


def test_transcripts_without_words_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = speech()
    nothing = torch.full_like(examples["labels"], -100)
    with pytest.raises(PermpruneError, match="no words"):
        word_error_rate(make("whisper"), Examples({**examples, "labels": nothing}), tiny_tokenizer)


@torch.no_grad()
def test_perplexity_of_a_decoder_and_of_padded_text(tiny_llama: LlamaForCausalLM) -> None:
    model, examples = make("whisper"), speech()
    assert evaluate_model(model, examples)[0].value == pytest.approx(float(model(**examples).loss.exp()), rel=1e-4)
    padded = sentences(labels=False)
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    (result,) = evaluate_model(tiny_llama, padded)
    assert result.value == pytest.approx(float(tiny_llama(**padded, labels=labels).loss.exp()), rel=1e-4)
    assert result.count == int(padded["attention_mask"].sum()) - 12


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_perplexity_of_answers(batch: int, tiny_llama: LlamaForCausalLM) -> None:
    examples, texts = padded_answers()
    losses = [
        F.cross_entropy(tiny_llama(text[None]).logits[0, first - 1 : last - 1], text[first:last], reduction="none")
        for text, first, last in texts
    ]
    result, exact = evaluate_model(tiny_llama, examples, batch=batch)
    assert result.value == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    assert result.count == sum(len(one) for one in losses)
    assert (exact.metric.name, exact.value, exact.count) == ("exact match", 0, 5)
    divided = in_processes(2, lambda: evaluate_model(copy.deepcopy(tiny_llama), examples, batch=batch)[0])
    assert [one.value for one in divided] == pytest.approx([result.value] * 2, rel=1e-6)
    agreement, divergence = evaluate_model(tiny_llama, examples, dense=tiny_llama, batch=batch)
    assert agreement.value == 1 and agreement.count == result.count and abs(divergence.value) < 1e-5


def test_answers_that_greedy_decoding_gives_are_exact_matches(tiny_llama: LlamaForCausalLM) -> None:
    examples, texts = padded_answers()
    for row in (1, 3):
        text, first, last = texts[row]
        greedy = {"do_sample": False, "min_new_tokens": last - first, "max_new_tokens": last - first}
        written = tiny_llama.generate(text[None, :first], **greedy)[0]
        examples["input_ids"][row, :last] = written
        examples["labels"][row, first:last] = written[first:]
    examples["labels"][4] = -100  # without an answer it does not count
    exact = evaluate_model(tiny_llama, examples, batch=2)[1]
    assert (exact.value, exact.count) == (0.5, 4)
    shared = in_processes(2, lambda: evaluate_model(copy.deepcopy(tiny_llama), examples, batch=2)[1])
    assert shared == [exact] * 2


def test_the_metric_follows_from_the_examples(tiny_llama: LlamaForCausalLM) -> None:
    ids = Examples.of(draw(128, 3, 8))
    assert evaluate_model(tiny_llama, ids) == [perplexity(tiny_llama, ids)]
    assert evaluate_model(make("bert"), sentences())[0].metric.name == "top-1 accuracy"
    with pytest.raises(PermpruneError, match="give examples with labels, or a dense model"):
        evaluate_model(make("headless"), EXAMPLES["headless"]())


def test_without_jiwer_it_is_asked_for(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(PermpruneError, match=r"pip install 'permprune\[audio\]'"):
        word_error_rate(make("whisper"), speech(), tiny_tokenizer)
