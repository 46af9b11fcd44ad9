"""Texts or pairs of texts, with class labels or scores, or to embed: lines of text, or the texts of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.items import Labels, Selection, as_number
from permprune.data.sources import LABEL_COLUMNS, TABLES, find_column, locate, read_rows
from permprune.data.text import load_documents
from permprune.errors import PermpruneError
from permprune.examples import Part
from permprune.models.forward import argument_names
from permprune.models.processors import Processor, tokenizer_of
from permprune.system.progress import log

TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
    ("content",),
    ("review",),
)
"""Names of text columns; the first entry whose columns a table all has is used."""


@dataclass(frozen=True)
class LabelledTexts:
    """The texts of a table by column, its labels, and the names of the classes by number if it defines them."""

    source: str
    texts: list[list[str]]
    labels: list[Any]
    names: Sequence[str] | None = None

    def classes(self) -> list[str] | None:
        """The names of the classes: those of the data set, or else all distinct labels, sorted; None for scores.

        Labels are scores if all are numbers and some are not integers. Raises `PermpruneError` for fewer than 2
        classes.
        """
        labels = {str(label) for label in self.labels}
        numbers = {label: number for label in labels if (number := as_number(label)) is not None}
        if len(numbers) == len(labels) and not all(number.is_integer() for number in numbers.values()):
            return None
        classes = list(self.names or sorted(labels, key=lambda label: (numbers.get(label, 0.0), label)))
        if len(classes) < 2:
            raise PermpruneError(f"{self.source} has {len(classes)} classes: give data with labels of two or more")
        return classes


def read_labelled_text(source: str | Path, part: Part, labelled: bool = True) -> LabelledTexts:
    """Read texts and labels from a table (e.g. of GLUE) or a `datasets` name.

    Raises `PermpruneError` if the source cannot be read or lacks a column of texts, or with `labelled` one of labels.
    """
    locate(source, "labelled text")
    rows, names = read_rows(source, part)
    columns = next((texts for texts in TEXTS if all(text in rows[0] for text in texts)), None)
    if columns is None:
        columns = (find_column(rows[0], [text for (text, *more) in TEXTS if not more], str(source)),)
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise PermpruneError(f"{source}, row {number} has no text in its column {column}")
    texts = [[row[column] for row in rows] for column in columns]
    has_labels = labelled or not rows[0].keys().isdisjoint(LABEL_COLUMNS)
    label = find_column(rows[0], LABEL_COLUMNS, str(source)) if has_labels else ""
    labels = [row.get(label) for row in rows] if has_labels else []
    return LabelledTexts(str(source), texts, labels, names.get(label))


def load_labelled_text(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection, length: int
) -> dict[str, Tensor]:
    """Load texts or pairs of texts, tokenized.

    Returns `input_ids`, `attention_mask` and other outputs of the tokenizer that the model takes, int64
    (count, tokens), truncated to `length` tokens and padded to the longest. If the model takes labels, also `labels`
    (count,): int64 for classes, fp32 for scores. If the parts share a source, equal texts are in the same half. Raises
    `PermpruneError` if the source cannot be read, or a label is unknown to the model.
    """
    taken = argument_names(model)
    labels = Labels(model.config) if "labels" in taken else None
    table = read_labelled_text(source, selection.part, labels is not None)
    if not Path(source).is_file():
        selection = selection.of_data_set(str(source))
    chosen = selection.indices(["\x1f".join(texts) for texts in zip(*table.texts, strict=True)])
    tensors = tokenized(model, processor, [[column[index] for index in chosen] for column in table.texts], length)
    if labels:
        classes = [table.labels[index] for index in chosen]
        if table.names:
            classes = [labels.named(label, table.names) for label in classes]
        tensors["labels"] = labels.tensor(classes, [f"{source}, row {index + 1}" for index in chosen])
    return tensors


def tokenized(
    model: PreTrainedModel, processor: Processor | None, columns: Sequence[list[str]], length: int
) -> dict[str, Tensor]:
    """Return what the tokenizer makes of texts, or of pairs in two columns, as far as the model takes it.

    The tensors are int64 (texts, tokens), cut at `length` tokens and padded to the longest. Raises `PermpruneError` if
    the tokenizer has no padding token.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        raise PermpruneError("texts of several lengths need padding, and the tokenizer has no pad_token: set one")
    taken, most = argument_names(model), min(length, tokenizer.model_max_length)
    made = tokenizer(*columns, truncation=True, max_length=most, padding=True, return_tensors="pt")
    return {name: tensor for name, tensor in made.items() if name in taken}


def load_sentences(
    source: str | None, model: PreTrainedModel, processor: Processor | None, selection: Selection, length: int
) -> dict[str, Tensor]:
    """Load texts for a sentence encoder, tokenized as by `tokenized`.

    `source` is a text file with a text in each line, a table or a data set as in `load_labelled_text`, or None: the
    documents of the default text. Of a table for the evaluation with two columns of texts and a score in each row,
    examples 2 i and 2 i + 1 are a pair, and both have its score as label, fp32; else all texts are examples of their
    own, and there are no labels. If the parts share a source, no text is in both halves.
    """
    path, scores = Path(source or ""), list[Any]()
    if source is None or (path.is_file() and path.suffix.lower() not in TABLES):
        lines = [line.strip() for document in load_documents(source, selection.part) for line in document.splitlines()]
        columns = [[line for line in lines if line]]
    else:
        table = read_labelled_text(source, selection.part, labelled=False)
        columns, scores = table.texts, table.labels if len(table.texts) > 1 else []
        if not path.is_file():
            selection = selection.of_data_set(source)
    rows = list(zip(*columns, strict=True))
    keys = ["\x1f".join(row) for row in rows]
    if scores and selection.part == "evaluation":
        chosen = selection.indices(keys)
        tensors = tokenized(model, processor, [[text for index in chosen for text in rows[index]]], length)
        labels = [_score(scores[index], f"{source}, row {index + 1}") for index in chosen]
        return {**tensors, "labels": torch.tensor(labels, dtype=torch.float32).repeat_interleave(2)}
    texts = list(dict.fromkeys(text for column in columns for text in column))
    if scores:  # the evaluation gets pairs, and a text can be in several
        evaluated = {text for row, key in zip(rows, keys, strict=True) if not selection.takes(key) for text in row}
        texts, selection = [text for text in texts if text not in evaluated], replace(selection, shared=False)
    elif len(columns) > 1 and selection.part == "evaluation":
        log.info("%s has pairs of texts without scores: each text counts by itself", source)
    return tokenized(model, processor, [[texts[index] for index in selection.indices(texts)]], length)


def _score(label: object, place: str) -> float:
    score = as_number(str(label))
    if score is None or not math.isfinite(score):
        raise PermpruneError(f"{place} has {label!r:.40} as its score: give numbers, or texts without labels")
    return score
