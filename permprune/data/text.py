"""Load text and cut it into windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from permprune.data.sources import LABEL_COLUMNS, TABLES, dataset, locate, read_text
from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use
from permprune.system.progress import log

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.examples import Part
    from permprune.zoo.texts import text_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_CHARACTERS = 50_000_000
"""Maximum number of characters read from a hub data set."""

POOL = 4
"""With a seed, windows are chosen at random from `POOL` times as many."""

FIELD = "text"
"""The column of a table with its texts."""

_MARGIN = 64


def load_documents(source: str | Path | None, part: Part) -> list[str]:
    """Load the documents of a text.

    `source` is one of

    * None: the given `part` of the default text;
    * a .jsonl, .json, .parquet, .csv or .tsv file: one document per row, in the column "text";
    * any other file: a single document;
    * a `datasets` name, "name", "name:config", "name@split" or "name:config@split", or the folder of a data set: the
      column "text" of each row. The default split is "train" for calibration and "test" for evaluation.

    Of a data set, the first `MAX_CHARACTERS` characters are streamed. If some rows are empty, the rows are lines of one
    document and are joined by blank lines (as WikiText in GPTQ, SparseGPT and Wanda). Raises `PermpruneError` if the
    text cannot be read or is empty.
    """
    path = text_file(part) if source is None else locate(source, "text file")
    if path and path.is_file() and path.suffix.lower() not in TABLES:
        read = [read_text(path)]
    else:
        read = _read_column(path or Path(str(source)), part)
    documents = [document for document in read if document.strip()]
    if not documents:
        raise PermpruneError(f"{source or path} holds no text")
    return documents


def tokenize(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int | None = None,
    apart: int = 0,
) -> Tensor:
    """Tokenize documents and cut them into `count` non-overlapping windows of `length` tokens: int64 (count, length).

    Documents are concatenated, with the tokenizer's end-of-sequence token (if it has one) between them. If the
    tokenizer puts a beginning-of-sequence token before every text, every window begins with it, because some models
    fail without it. No other special tokens are added.

    Without a seed, the first windows of the text are returned, and only as much text as they need is tokenized. With a
    seed, documents are taken in random order until there are `POOL` * `count` windows or the text ends, and `count` of
    these windows are chosen at random. The first `apart` of them are in the order of the text, and come from other
    documents than the rest, except for the one that the last of them may share with it. If the text has too few tokens,
    fewer windows are returned. Raises `PermpruneError` if it is shorter than one window.
    """
    if length < 2 or count < 1:
        raise PermpruneError(f"{count} windows of {length} tokens are too few: ask for at least 1 window of 2 tokens")
    generator = torch.Generator().manual_seed(seed or 0)
    order = range(len(documents)) if seed is None else torch.randperm(len(documents), generator=generator).tolist()
    start = start_tokens(tokenizer)
    step = length - len(start)
    wanted = count * step * (1 if seed is None else POOL)
    ids = list(islice(_stream([documents[i] for i in order], tokenizer, wanted), wanted))
    available = len(ids) // step
    if not available:
        raise PermpruneError(f"the text has {len(ids)} tokens, too few for a window of {length}: give more text")
    count = min(count, available)
    windows = torch.tensor(ids[: available * step], dtype=torch.int64).view(available, step)
    windows = torch.cat([torch.tensor(start, dtype=torch.int64).expand(available, -1), windows], 1)
    if seed is None:
        return windows[:count]
    chosen = torch.randperm(available, generator=generator)[:count]
    first, rest = chosen.sort().values.split([min(apart, count), max(0, count - apart)])
    return windows[torch.cat([first, chosen[torch.isin(chosen, rest)]])]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokenizer puts it before every text, else an empty list."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> Iterator[int]:
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, document in enumerate(documents):
        yield from separator if number else []
        yield from _encode(document, tokenizer, wanted)


def _encode(document: str, tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """All tokens of a document, or its first `wanted` tokens, tokenizing only as much of the document as necessary.

    The last tokens before a cut may differ from those of the whole document, so a margin of tokens is discarded.
    """
    characters = 8 * (wanted + _MARGIN)
    while True:
        ids: list[int] = tokenizer(document[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if characters >= len(document):
            return ids
        if len(ids) >= wanted + _MARGIN:
            return ids[:wanted]
        characters *= 2


def _read_column(source: Path, part: Part) -> list[str]:
    """The texts in the column `FIELD` of a table or data set, where null stands for an empty one.

    A warning says so if there are labels, which models of text have no use for.
    """
    documents, characters, most = [], 0, math.inf if source.is_file() else MAX_CHARACTERS
    with dataset(str(source), part) as rows:
        for number, row in enumerate(rows, 1):
            if number == 1 and FIELD not in row:
                held = ", ".join(map(str, row))
                raise PermpruneError(
                    f'{source} has no column "{FIELD}": name one so among its columns, which are {held}'
                )
            if number == 1 and not row.keys().isdisjoint(LABEL_COLUMNS):
                log.warning('%s has labels, but the model takes none: only its column "%s" is read', source, FIELD)
            if FIELD not in row or not isinstance(row[FIELD], str | None):
                raise PermpruneError(f'{source}, row {number} has no text in its column "{FIELD}"')
            documents.append(row[FIELD] or "")
            characters += len(documents[-1])
            if characters >= most:
                break
    return ["\n\n".join(documents)] if "" in documents and not source.is_file() else documents
