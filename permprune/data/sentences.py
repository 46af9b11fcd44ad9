"""Sentences to embed: lines of text, the texts of a table, or pairs of texts with a score of their similarity."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.items import Selection, as_number
from permprune.data.labelled import read_labelled_text, tokenized
from permprune.data.sources import TABLES
from permprune.data.text import load_documents
from permprune.errors import PermpruneError
from permprune.models.processors import Processor
from permprune.system.progress import log


def load_sentences(
    source: str | None, model: PreTrainedModel, processor: Processor | None, selection: Selection, length: int
) -> dict[str, Tensor]:
    """Load texts for a sentence encoder, tokenized as by `tokenized`.

    `source` is a text file with a text in each line, a table or a data set as in `load_labelled_text`, or None: the
    documents of the default text. Of a table for the evaluation with two columns of texts and a score in each row,
    examples 2 i and 2 i + 1 are a pair, and both have its score as label, fp32; else all texts are examples of their
    own, and there are no labels. If the parts share a source, equal texts are in the same half. Raises `PermpruneError`
    if the source cannot be read, or a score is not a number.
    """
    path, scores = Path(source or ""), list[object]()
    if source is None or (path.is_file() and path.suffix.lower() not in TABLES):
        lines = [line.strip() for document in load_documents(source, selection.part) for line in document.splitlines()]
        columns = [[line for line in lines if line]]
    else:
        columns, scores = _table(source, selection)
        if not path.is_file():
            selection = selection.of_data_set(source)
    if not scores:
        texts = list(dict.fromkeys(text for column in columns for text in column))
        return tokenized(model, processor, [[texts[index] for index in selection.indices(texts)]], length)
    chosen = selection.indices(["\x1f".join(pair) for pair in zip(*columns, strict=True)])
    tensors = tokenized(model, processor, [[column[index] for index in chosen for column in columns]], length)
    labels = [_score(scores[index], f"{source}, row {index + 1}") for index in chosen]
    return {**tensors, "labels": torch.tensor(labels, dtype=torch.float32).repeat_interleave(2)}


def _table(source: str, selection: Selection) -> tuple[list[list[str]], list[object]]:
    """The columns of texts of a table or data set, and the scores of pairs for the evaluation."""
    table = read_labelled_text(source, selection.part, labelled=False)
    if len(table.texts) < 2 or selection.part != "evaluation":
        return table.texts, []
    try:
        return table.texts, read_labelled_text(source, selection.part).labels
    except PermpruneError:
        log.info("%s has pairs of texts without scores: each text counts by itself", source)
        return table.texts, []


def _score(label: object, place: str) -> float:
    score = as_number(str(label))
    if score is None:
        raise PermpruneError(f"{place} has {label!r:.40} as its score: give numbers, or texts without labels")
    return score
