"""Where examples come from, be it a table, a folder or a hub data set, and which of them a part is given."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import torch

from permprune.errors import PermpruneError
from permprune.examples import Part

BUFFER = 1000
"""Rows of a streamed data set that are held to be mixed, at least."""

ROW = "__row__"
"""A column for the names of a data set's rows."""

TABLES = (".csv", ".tsv", ".jsonl")
LISTS = ("labels", "metadata", "transcripts")
"""Tables, by suffix and by name, that lie beside images or sound and say what is in them."""

FILE_COLUMNS = ("file_name", "file", "filename", "path", "image", "audio")
LABEL_COLUMNS = ("label", "labels", "gold_label", "score", "class", "is_duplicate", "fine_label")

_PATH_LIKE = re.compile(r"[./~].*|.*\\.*|.*/.*/.*|.*\.(txt|jsonl?|csv|tsv|raw|tokens)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """An example: its name in error messages, how to read it, and what the source says of it, if anything."""

    name: str
    read: Callable[[], Any]
    label: Any = None


def locate(source: str | Path, what: str) -> Path | None:
    """The file or folder that a source is; None for the id of a data set. Raises `PermpruneError` for neither."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or looks_like_path(source):
        raise PermpruneError(f"no {what} at {path}: give an existing file or folder, or the name of a hub data set")
    return None


def looks_like_path(source: str) -> bool:
    return _PATH_LIKE.fullmatch(source) is not None


def read_text(path: Path) -> str:
    """A UTF-8 file, character for character. Raises `PermpruneError` when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PermpruneError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise PermpruneError(f"cannot read {path}: {error.strerror}") from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv or .tsv file, whose first row names the columns unless they are given.

    Quotes mean nothing in a .tsv, as in the GLUE files. Raises `PermpruneError` when it is no such table, or empty.
    """
    text = read_text(path).removeprefix("\ufeff")
    if path.suffix == ".jsonl":
        rows = [_json_object(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif path.suffix in TABLES:
        tabs = path.suffix == ".tsv"
        reader = csv.DictReader(
            io.StringIO(text, newline=""),
            columns,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        )
        try:
            rows = list(reader)
        except csv.Error as error:
            raise PermpruneError(f"{path}, line {reader.line_num}: {error}") from error
    else:
        raise PermpruneError(f"{path} is no table: give a {', '.join(TABLES[:-1])} or {TABLES[-1]} file")
    if not rows:
        raise PermpruneError(f"{path} holds no rows")
    return rows


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text, whose strings hold whole characters.

    Raises `PermpruneError` that begins with `place` for text that is no JSON, is nested deeper than Python can follow,
    or holds half of a surrogate pair ("\\ud83d"), which tokenizers refuse.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # the escape of half a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PermpruneError(f"{place}: half of a surrogate pair is no character: remove it") from error
    except RecursionError as error:
        raise PermpruneError(f"{place}: JSON nested too deep: flatten it") from error
    except ValueError as error:
        raise PermpruneError(f"{place}: no JSON ({getattr(error, 'msg', error)})") from error
    return value


def find_column(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    """The first of these columns that a row has. Raises `PermpruneError` where there is none."""
    found = next((name for name in names if name in row), None)
    if found is None:
        held = ", ".join(str(name) for name in row)
        raise PermpruneError(f"{place} has none of the columns {', '.join(names)}: it has {held}")
    return found


def list_files(folder: Path, suffixes: Iterable[str], what: str) -> list[Path]:
    """All files of these kinds in a folder and those inside it, sorted. Raises `PermpruneError` for none."""
    kinds = set(suffixes)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    if not found:
        raise PermpruneError(f"{folder} holds no {what}: give a folder of {', '.join(sorted(kinds))} files")
    return found


def find_list(path: Path) -> Path | None:
    """The table that lists the files of a folder, or is given in its place; None where there is none."""
    if path.is_file():
        return path
    return next((file for name in LISTS for kind in TABLES if (file := path / f"{name}{kind}").is_file()), None)


def listed_items(table: Path, labels: Sequence[str], read: Callable[[Path], Any]) -> list[Item]:
    """What a table lists: a file in each row, beside the table or below it, and in a column of `labels` what it is.

    Raises `PermpruneError` when a file is missing.
    """
    rows = read_table(table)
    column, label = find_column(rows[0], FILE_COLUMNS, str(table)), find_column(rows[0], labels, str(table))
    items = []
    for row in rows:
        file = table.parent / str(row.get(column))
        if not file.is_file():
            raise PermpruneError(f"{table} lists {row.get(column)}, and there is no such file beside it")
        items.append(Item(str(file), lambda file=file: read(file), row.get(label)))  # type: ignore[misc]
    return items


def pick(keys: Sequence[str], part: Part, count: int, seed: int, shared: bool) -> list[int]:
    """Up to `count` examples of a part in random order, as positions in `keys`, which names them.

    If both parts share the source, each has the half of it that the digests of the names give it, whatever the seed
    and the count. Raises `PermpruneError` when none is left or wanted.
    """
    own = [at for at, key in enumerate(keys) if not shared or _half(key) == part]
    if not own or count < 1:
        raise PermpruneError(f"{count} of {len(own)} examples for {part}: ask for 1 or more, and give more data")
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    return [own[at] for at in order[:count].tolist()]


def pick_items(items: Sequence[Item], path: Path, part: Part, count: int, seed: int, shared: bool) -> list[Item]:
    """As `pick`, of the items of a folder or table, whose names are those within the folder, wherever it lies."""
    folder = path if path.is_dir() else path.parent
    keys = [Path(item.name).relative_to(folder).as_posix() for item in items]
    return [items[at] for at in pick(keys, part, count, seed, shared)]


def pick_rows(rows: Any, part: Part, count: int, seed: int, shared: bool) -> list[tuple[str, dict[str, Any]]]:
    """Up to `count` rows of a streamed data set, mixed over a buffer, and their names; otherwise as `pick`."""
    rows = rows.map(lambda _, at: {ROW: f"row {at}"}, with_indices=True)
    if shared:
        rows = rows.filter(lambda row: _half(row[ROW]) == part)
    rows = rows.shuffle(seed=seed, buffer_size=max(BUFFER, 4 * count))
    picked = [(row.pop(ROW), row) for row in islice(rows, count)]
    if not picked:
        raise PermpruneError(f"the data set has no rows for {part}: give another split of it")
    return picked


def stored_file(cell: Any, place: str) -> io.BytesIO:
    """The file in a cell of a data set, wherever it lies. Raises `PermpruneError` when it holds none."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, dict) and cell.get("path"):
        with fsspec.open(cell["path"], "rb") as file:
            return io.BytesIO(file.read())
    raise PermpruneError(f"{place} holds no file: give a data set with a column of images or of sound")


def parse_name(source: str, part: Part) -> tuple[str, str | None, str]:
    """Name, configuration and split of "name:config@split"; the default split is "train" or "test"."""
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return name, config or None, split or ("train" if part == "calibration" else "test")


def shares_rows(source: str, shared: bool) -> bool:
    """Whether the parts of a data set share its rows: not by default, since they are then two splits of it."""
    return shared and "@" in source


@contextmanager
def dataset(source: str, part: Part) -> Iterator[Any]:
    """The split of a data set that a source names, to be streamed inside the block; images and sound stay files.

    Raises `PermpruneError` for whatever datasets raises there.
    """
    import datasets

    name, config, split = parse_name(source, part)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for column, kind in (getattr(rows, "features", None) or {}).items():
            if getattr(kind, "decode", False):
                rows = rows.cast_column(column, replace(kind, decode=False))
        yield rows
    except PermpruneError:
        raise
    except Exception as error:  # datasets raises whatever its readers, fsspec and the network raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(
            f'"{name}" is no file here, and its split "{split}" does not load as a data set: {reason}'
        ) from error


def _half(key: str) -> Part:
    return "evaluation" if hashlib.sha256(key.encode()).digest()[0] % 2 else "calibration"


def _json_object(line: str, place: str) -> dict[str, Any]:
    row = parse_json(line, place)
    if not isinstance(row, dict):
        raise PermpruneError(f"{place}: no JSON object")
    return row
