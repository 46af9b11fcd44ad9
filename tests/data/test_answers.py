"""Prompts with answers, and conversations, as examples of a language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

from permprune import PruneConfig
from permprune.data.answers import has_answers
from permprune.data.load import load_examples
from permprune.data.overlap import overlap
from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.plan import calibration_examples

from ..conversations import ANSWERS, PROMPTS, TEMPLATE, turns, with_template, write_answers, write_rows
from ..fixtures import BLOCK
from ..vision_language import qwen
from .tables import write_table

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def chatty(tiny_tokenizer: Tokenizer) -> Tokenizer:
    """The tiny tokenizer with a chat template."""
    return with_template(tiny_tokenizer)


def load(model: Any, tokenizer: Any, source: Path | str, count: int = 9, **options: Any) -> Examples:
    options = {"part": "calibration", "length": 64, **options}
    return load_examples(str(source), model, tokenizer, count=count, **options)


def counted(examples: Examples, tokenizer: Tokenizer) -> list[list[str]]:
    """The tokens that count, in runs."""
    runs = []
    for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        places = (labels != IGNORED).nonzero()[:, 0]
        ends = (places.diff() > 1).nonzero()[:, 0] + 1
        runs.append([tokenizer.decode(ids[run]) for run in places.tensor_split(ends)])
    return runs


def test_answers_count_and_prompts_and_padding_do_not(
    chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    examples = load(tiny_llama, chatty, write_rows(tmp_path / "a.jsonl", rows))
    assert sorted(counted(examples, chatty)) == sorted([answer + "</s>"] for answer in ANSWERS)
    for ids, mask in zip(examples["input_ids"], examples["attention_mask"], strict=True):
        assert mask.diff().le(0).all() and ids[mask == 0].eq(0).all()  # padding is at the end
        text = chatty.decode(ids[mask == 1])
        assert any(f"<s> user {prompt}</s>" in text for prompt in PROMPTS)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("which weights", "two")},
        {"question": "which weights", "answers": ["two", "four"]},
        {"instruction": "which weights", "input": "", "output": "two"},
        {"prompt": "which weights", "completion": "two", "text": "which weights survive"},
        {"query": "which weights", "response": "two", "label": 1},
    ],
    ids=lambda row: next(iter(row)),
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "train.jsonl"])
def test_tables_and_data_sets(
    row: dict[str, Any], name: str, chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_table(tmp_path / name, [row, row])
    examples = load(tiny_llama, chatty, tmp_path if name.startswith("train") else path)
    assert counted(examples, chatty) == [["two</s>"]] * 2


def test_an_input_follows_its_instruction(chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    row = {"instruction": "which weights", "input": "of four", "output": "two"}
    (ids,) = load(tiny_llama, chatty, write_rows(tmp_path / "a.jsonl", [row]))["input_ids"]
    text = chatty.apply_chat_template(turns("which weights\n\nof four", "two"), tokenize=False)
    assert ids.tolist() == chatty(text, add_special_tokens=False)["input_ids"]


def test_every_answer_of_a_conversation_counts(chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be short"}, *turns("which", "two of", "no", "four")]
    greeting = [{"role": "assistant", "content": "the text"}, *turns("is it", "it is")]
    for given, answers in ((talk, ["two of</s>", "four</s>"]), (greeting, ["it is</s>"])):
        examples = load(tiny_llama, chatty, write_rows(tmp_path / "a.jsonl", [{"messages": given}]))
        assert counted(examples, chatty) == [answers]
        whole = chatty.apply_chat_template(given, return_dict=True)["input_ids"]
        assert examples["input_ids"][0].tolist() == whole


def test_an_answer_that_the_template_rewrites_later_does_not_count(
    tiny_tokenizer: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    reasoned = "(' so ' if loop.last and turn.role == 'assistant' else ' ')"
    tokenizer = with_template(tiny_tokenizer, TEMPLATE.replace("' '", reasoned))
    source = write_rows(tmp_path / "a.jsonl", [{"messages": turns("which", "two", "no", "four")}])
    (found,) = counted(load(tiny_llama, tokenizer, source), tokenizer)
    assert found == ["so four</s>"]


def test_without_a_template_turns_are_lines(
    tiny_tokenizer: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    texts: dict[str, tuple[dict[str, object], list[str]]] = {
        "which\ntwo</s>": ({"prompt": "which", "answer": "two"}, ["two</s>"]),
        "which two</s>": ({"prompt": "which", "answer": " two"}, ["two</s>"]),
        "which\ntwo</s>\nno\nfour</s>": ({"messages": turns("which", "two", "no", "four")}, ["two</s>", "four</s>"]),
    }
    for text, (row, answers) in texts.items():
        examples = load(tiny_llama, tiny_tokenizer, write_rows(tmp_path / "a.jsonl", [row]))
        assert examples["input_ids"][0].tolist() == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert counted(examples, tiny_tokenizer) == [answers]


def test_a_beginning_of_text_is_as_everywhere(
    tiny_tokenizer: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": "which", "answer": "two"}])
    examples = load(tiny_llama, tokenizer, source)
    assert examples["input_ids"][0].tolist() == tokenizer("which\ntwo</s>")["input_ids"]
    assert examples["input_ids"][0, 0] == tokenizer.bos_token_id and examples["labels"][0, 0] == IGNORED


def test_what_is_cut_and_left_out_is_said(
    chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "which", "answer": "two " * 60},
        {"prompt": "which " * 60, "answer": "two"},
        {"prompt": "which", "answer": ""},
        {"prompt": "which", "answer": None},
        {"prompt": "which"},
        {"messages": turns("which")},
        {"prompt": "which", "answer": "two"},
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    examples = load(tiny_llama, chatty, source, length=32)
    assert len(examples) == 2 and examples["input_ids"].shape[1] == 32
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"{source}: of 7 rows, " in record.message
    for what in (
        "1 cut after 32 tokens",
        "5 left out without an answer in their first 32",
    ):
        assert what in record.message
    write_rows(tmp_path / "a.jsonl", rows[1:6])
    with pytest.raises(PermpruneError, match=r"a\.jsonl has no answer in the first 32 tokens of its rows"):
        load(tiny_llama, chatty, source, length=32)


def test_rows_without_an_answer_do_not_take_the_place_of_others(
    chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    rows = [{"prompt": f"which {i}", "answer": "two" if i % 3 else ""} for i in range(30)]
    assert len(load(tiny_llama, chatty, write_rows(tmp_path / "a.jsonl", rows), count=8)) == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, 'row 2: "messages" is no list of'),
        ({"messages": [{"role": "user"}]}, 'row 2: "messages" is no list of'),
        ({"messages": [{"role": "user", "content": None}]}, 'row 2: "messages" is no list of'),
        ({"messages": None}, 'row 2: "messages" is no list of'),
        ({"prompt": 3, "answer": "a"}, 'row 2 has no text in its column "prompt"'),
        ({"prompt": "a", "answer": {"text": "a"}}, 'row 2 has no text in its column "answer"'),
    ],
)
def test_bad_rows_are_named(
    row: dict[str, object], message: str, chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": "which", "answer": "two"}, row])
    with pytest.raises(PermpruneError, match=rf"a\.jsonl, {message}"):
        load(tiny_llama, chatty, source)


def test_a_template_that_fails_is_named(
    tiny_tokenizer: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": "which", "answer": "two"}])
    with pytest.raises(PermpruneError, match="row 1: the model's chat template fails: roles must alternate"):
        load(tiny_llama, tokenizer, source)


def test_only_causal_language_models_answer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(**BLOCK, vocab_size=128))
    with pytest.raises(PermpruneError, match="BertForMaskedLM is no causal language model: give text"):
        load(model, tiny_tokenizer, write_answers(tmp_path / "a.jsonl", 3))


def test_the_template_of_a_processor_of_images(tmp_path: Path) -> None:
    model, processor = qwen()
    examples = load(
        model, processor, write_rows(tmp_path / "a.jsonl", [{"messages": turns("which?", "two", "so", "no")}])
    )
    assert counted(examples, processor.tokenizer) == [["two<|im_end|>", "no<|im_end|>"]]  # type: ignore[attr-defined]
    assert "which?<|im_end|>" in processor.tokenizer.decode(examples["input_ids"][0])  # type: ignore[attr-defined]


def test_halves_of_one_source_share_no_prompt(chatty: Tokenizer, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"which {'of ' * (i % 11)}", "answer": answer} for i in range(22) for answer in ANSWERS
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    first, second = (
        load(tiny_llama, chatty, source, 99, part=part, shared=True) for part in ("calibration", "evaluation")
    )
    assert len(first) + len(second) == len(rows)
    assert overlap([first], second) == 0 and overlap([first], first) == 1


@pytest.mark.parametrize("name", ["text.txt", "missing.jsonl", "no/such/set"])
def test_text_has_no_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text('{"prompt": "a", "answer": "b"}')
    assert not has_answers(name, "calibration") and not has_answers(None, "calibration")


def test_text_beside_answers_counts_as_a_whole(
    tiny_tokenizer: Tokenizer, tiny_llama: LlamaForCausalLM, tiny_text: Path, tmp_path: Path
) -> None:
    sources = [str(write_answers(tmp_path / "a.jsonl", 12)), str(tiny_text)]
    config = PruneConfig(calibration=sources, samples=16, length=48)
    examples = calibration_examples(tiny_llama, tiny_tokenizer, config)
    assert len(examples) == 16 and examples.keys() == ["input_ids", "attention_mask", "labels"]
    whole = (examples["labels"] == examples["input_ids"]).all(1)
    assert whole.tolist() == [False, True] * 8
    text = load(tiny_llama, tiny_tokenizer, tiny_text, 999, length=48)
    assert text.keys() == ["input_ids"]
    assert all(window in text["input_ids"].tolist() for window in examples["input_ids"][whole].tolist())
