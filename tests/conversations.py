"""A chat template for the tiny tokenizer, and tables of prompts and answers."""

import copy
import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from permprune.examples import IGNORED, Examples

TEMPLATE = (
    "{% for turn in messages %}{{ '<s>' + turn.role + ' ' + turn.content + '</s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)

PROMPTS = ["which weights survive", "what is short", "is the model dense or is it a permutation of the channels"]
ANSWERS = ["two of every four weights", "the text", "a permutation changes nothing"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer with a chat template."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def turns(*texts: str) -> list[dict[str, str]]:
    """Turns of a user and an assistant."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a table of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_answers(path: Path, count: int) -> Path:
    """Write prompts with answers of several lengths."""
    pairs = [(f"{PROMPTS[i % 3]} {'so ' * (i % 5)}", f"{ANSWERS[i % 3]} {'or ' * (i % 4)}no") for i in range(count)]
    return write_rows(
        path, [{"prompt": prompt + f"{i} is", "answer": answer} for i, (prompt, answer) in enumerate(pairs)]
    )


def padded_answers() -> tuple[Examples, list[tuple[torch.Tensor, int, int]]]:
    """Random examples padded at the end, and each text (tokens,) with the first and the last place of its answer."""
    generator = torch.Generator().manual_seed(0)
    spans = [(9, 3, 7), (14, 9, 14), (5, 1, 3), (12, 4, 6), (14, 2, 9)]
    texts = [(torch.randint(3, 128, (length,), generator=generator), first, last) for length, first, last in spans]
    ids, mask = torch.zeros(2, 5, 14, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, (text, first, last) in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, first:last] = text[first:last]
    return Examples({"input_ids": ids, "attention_mask": mask, "labels": labels}), texts
