"""Texts, or pairs of them, and the classes they are of."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.labels import Labels
from permprune.data.sources import LABEL_COLUMNS, dataset, find_column, locate, pick, read_table, shares_rows
from permprune.errors import PermpruneError
from permprune.inputs import argument_names
from permprune.processors import Processor, tokenizer_of
from permprune.zoo.texts import Part

MAX_ROWS = 1_000_000
"""How much of a hub data set is read."""

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
"""Columns of the texts that go together, of which a table's first match counts."""

COLA = ("source", "label", "mark", "sentence")
"""Columns of CoLA, which does not name them."""


def load_labelled_text(
    source: str | Path,
    model: PreTrainedModel,
    processor: Processor | None,
    part: Part,
    count: int,
    length: int,
    seed: int = 0,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Up to `count` texts or pairs of texts as the model's tokenizer makes them, drawn at random.

    `input_ids`, `attention_mask` and what else the model takes, int64 (count, tokens), cut to `length` tokens and
    padded to the longest; and, where the model takes them, `labels` (count,): int64, or fp32 if they are scores.

    `source` is a .tsv, .csv or .jsonl file with columns of texts and labels, as those of GLUE, or a `datasets` name or
    folder as in `load_documents`. With `shared`, the other part comes from the same source, of which each gets half;
    the same texts are never in both. Raises `PermpruneError`.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        raise PermpruneError("texts of several lengths need padding, and the tokenizer has no pad_token: set one")
    taken = argument_names(model)
    labels = Labels(model.config) if "labels" in taken else None
    path = locate(source, "labelled text")
    file = path if path and path.is_file() else None
    rows, names = (_from_file(file), {}) if file else _from_dataset(str(source), part)
    columns = next((texts for texts in TEXTS if all(text in rows[0] for text in texts)), None)
    if columns is None:
        columns = (find_column(rows[0], [text for (text, *more) in TEXTS if not more], str(source)),)
    halved = shared if file else shares_rows(str(source), shared)
    keys = ["\x1f".join(str(row[column]) for column in columns) for row in rows]
    chosen = pick(keys, part, count, seed, halved)
    texts = [_texts(rows, column, chosen, str(source)) for column in columns]
    made = tokenizer(
        *texts,
        truncation=True,
        max_length=min(length, tokenizer.model_max_length),
        padding=True,
        return_tensors="pt",
    )
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in made.items() if name in taken}
    if labels:
        column = find_column(rows[0], LABEL_COLUMNS, str(source))
        found = [rows[at][column] for at in chosen]
        if known := names.get(column):
            found = [labels.named(label, known) for label in found]
        tensors["labels"] = labels.tensor(found, [f"{source}, row {at + 1}" for at in chosen])
    return tensors


def _texts(rows: list[dict[str, Any]], column: str, chosen: list[int], source: str) -> list[str]:
    for at in chosen:
        if not isinstance(rows[at].get(column), str):
            raise PermpruneError(f"{source}, row {at + 1} has no text in its column {column}")
    return [rows[at][column] for at in chosen]


def _from_file(path: Path) -> list[dict[str, Any]]:
    rows = read_table(path)
    first = list(rows[0])
    return read_table(path, COLA) if len(first) == len(COLA) and first[1] in ("0", "1") else rows


def _from_dataset(source: str, part: Part) -> tuple[list[dict[str, Any]], Mapping[str, list[str] | None]]:
    """Rows, and the names of the classes by column."""
    with dataset(source, part) as rows:
        features = getattr(rows, "features", None) or {}
        held = list(islice(rows, MAX_ROWS))
    if not held:
        raise PermpruneError(f"{source} holds no rows: give another split of it")
    return held, {key: getattr(kind, "names", None) for key, kind in features.items()}
