"""Prompts with answers, and conversations: examples of a language model whose labels are the tokens of the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jinja2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from permprune.data.items import Selection
from permprune.data.sources import ANSWERS, PROMPTS, Row, columns_of, dataset
from permprune.data.text import start_tokens
from permprune.errors import PermpruneError, first_line
from permprune.examples import IGNORED, Examples, Part
from permprune.models.forward import is_causal_lm
from permprune.models.processors import Processor, shared_start, tokenizer_of
from permprune.system.progress import log

MESSAGES, ANSWERER = "messages", "assistant"
"""The column of conversations, and the role whose turns are answers."""

SPARE = 2
"""So many rows are drawn for each example that is wanted, because some may have no answer."""

Turn = dict[str, str]
"""The "role" of a speaker, and the "content"."""

Render = Callable[[Sequence[Turn], bool], str]
"""(turns, whether an answer is asked for) -> the text of a conversation."""


def has_answers(source: str | None, part: Part) -> bool:
    """Whether a source is a table or data set with a column of conversations, or with one of prompts and of answers.

    Raises `PermpruneError` if a data set does not load.
    """
    columns = {} if source is None else columns_of(source, part)
    return MESSAGES in columns or all(any(name in columns for name in names) for names in (PROMPTS, ANSWERS))


def load_answers(
    source: str, model: PreTrainedModel, processor: Processor | None, selection: Selection, length: int
) -> Examples:
    """Load conversations, or prompts with their answers, as inputs of a causal language model.

    Returns "input_ids" and "attention_mask", int64 (count, tokens), padded at the end, and "labels": the tokens of the
    answers, and -100 for prompts and padding. A row has a list `MESSAGES` of {"role", "content"}, in which all turns of
    the `ANSWERER` but the first turn are answers, or one of the columns `PROMPTS`, to which "input" is added, and one
    of `ANSWERS`. The text is that of the model's chat template, or else turns on lines with an end of text after each
    answer. Examples are cut after `length` tokens, and those without an answer left out; a warning says how many.

    If the parts share a table, rows with the same prompts are in the same half; rows of a data set are not compared.
    Raises `PermpruneError` if the source cannot be read, the model is no causal language model, its chat template
    fails, or no example is left.
    """
    if not is_causal_lm(model):
        raise PermpruneError(
            f"{source} has prompts with answers, and {type(model).__name__} is no causal language model: give text"
        )
    tokenizer = tokenizer_of(processor)
    render = _template_of(processor)
    start = start_tokens(tokenizer) if render is None else []
    examples, seen, notes = list[Examples](), 0, Counter[str]()
    for place, turns in _conversations(source, replace(selection, count=SPARE * selection.count)):
        if len(examples) == selection.count:
            break
        seen += 1
        try:
            ids, labels = _encode(turns, render or _plain(tokenizer), tokenizer)
        except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
            raise PermpruneError(f"{place}: the model's chat template fails: {first_line(error)}") from error
        ids, labels = start + ids, [IGNORED] * len(start) + labels
        if all(label == IGNORED for label in labels[1:length]):
            notes[f"left out without an answer in their first {length} tokens"] += 1
            continue
        if len(ids) > length:
            notes[f"cut after {length} tokens"] += 1
        tensors = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        examples.append(Examples({name: torch.tensor([values[:length]]) for name, values in tensors.items()}))
    if notes:
        log.warning("%s: of %d rows, %s", source, seen, ", ".join(f"{count} {what}" for what, count in notes.items()))
    if not examples:
        raise PermpruneError(f"{source} has no answer in the first {length} tokens of its rows: give other data")
    return Examples.join(examples)


def counted(windows: Examples) -> Examples:
    """Return windows of text with labels, the tokens themselves, and a mask: examples that answers can be joined to."""
    ids = windows["input_ids"]
    return Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def _conversations(source: str, selection: Selection) -> list[tuple[str, list[Turn]]]:
    """The rows that are chosen of a table or data set as turns, each with its place for error messages."""
    with dataset(source, selection.part) as rows:
        if isinstance(rows, list):
            read = [(place, _turns(row, place)) for n, row in enumerate(rows, 1) for place in [f"{source}, row {n}"]]
            prompts = [str([turn["content"] for turn in turns if turn["role"] != ANSWERER]) for _, turns in read]
            return [read[index] for index in selection.indices(prompts)]
        chosen = [(f"{source}, {name}", row) for name, row in selection.of_data_set(source).rows(rows)]
        return [(place, _turns(row, place)) for place, row in chosen]


def _turns(row: Row, place: str) -> list[Turn]:
    """The turns of a row. Raises `PermpruneError` if a turn, a prompt or an answer is no text."""
    if MESSAGES not in row:
        prompt, more, answer = (_cell(row, names, place) for names in (PROMPTS, ("input",), ANSWERS))
        prompt = f"{prompt}\n\n{more}" if more else prompt
        return [{"role": "user", "content": prompt}, {"role": ANSWERER, "content": answer}]
    try:
        turns = [{name: turn[name] for name in ("role", "content")} for turn in row[MESSAGES]]
    except (LookupError, TypeError):
        turns = []
    if not turns or not all(isinstance(text, str) for turn in turns for text in turn.values()):
        raise PermpruneError(f'{place}: "{MESSAGES}" is no list of {{"role": ..., "content": ...}} with a text in both')
    return turns


def _cell(row: Row, names: Sequence[str], place: str) -> str:
    """The text in the first of the columns `names` that a row has, of a list the first; empty if there is none."""
    column = next((name for name in names if name in row), None)
    value = row[column] if column else None
    value = next(iter(value), None) if isinstance(value, list) else value
    if not isinstance(value, str | None):
        raise PermpruneError(f'{place} has no text in its column "{column}": write it, or remove the row')
    return value or ""


def _template_of(processor: Processor | None) -> Render | None:
    """The chat template of a processor or its tokenizer; None if it has none."""
    owner: Any = processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)
    in_parts = isinstance(owner, ProcessorMixin)  # which reads images as well

    def render(turns: Sequence[Turn], asks: bool) -> str:
        given: Any = turns
        if in_parts:
            given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return str(owner.apply_chat_template(given, tokenize=False, add_generation_prompt=asks))

    return render if owner.chat_template else None


def _plain(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Turns on lines of their own, unless there is white space between them, with an end of text after each answer."""

    def render(turns: Sequence[Turn], asks: bool) -> str:
        whole = ""
        for number, turn in enumerate(turns):
            answers = number and turn["role"] == ANSWERER and turn["content"].strip()
            text = turn["content"] + (tokenizer.eos_token or "") * bool(answers)
            whole += ("\n" if whole and not (whole[-1].isspace() or text[:1].isspace()) else "") + text
        return whole + "\n" * asks

    return render


def _encode(turns: Sequence[Turn], render: Render, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and its labels.

    An end of turn belongs to an answer, white space after it does not, and a token that begins in a prompt and ends in
    the answer does. If the template shows an answer otherwise once another turn follows, as those do that leave out
    earlier reasoning, it does not count.
    """

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    whole = render(turns, False)
    ids = tokens(whole)
    labels = [IGNORED] * len(ids)
    for number, turn in enumerate(turns):
        if not number or turn["role"] != ANSWERER or not turn["content"].strip():
            continue
        before, until = (render(turns[:count], False).rstrip() for count in (number, number + 1))
        if whole.startswith(before) and whole.startswith(until):
            asked = whole[: shared_start(render(turns[:number], True), whole)]
            first, last = (shared_start(tokens(part), ids) for part in (asked, until))
            labels[first:last] = ids[first:last]
    return ids, labels
