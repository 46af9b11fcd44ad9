"""Sources of examples (tables, folders and hub data sets), and the choice of examples for each part."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from permprune.errors import PermpruneError
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import fsspec
    import torch

    from permprune.examples import Part

BUFFER = 1000
"""Minimum size, in rows, of the buffer for shuffling a streamed data set."""

ROW = "__row__"
"""A temporary column for the names of a data set's rows."""

TABLES = (".csv", ".tsv", ".jsonl")
LISTS = ("labels", "metadata", "transcripts")
"""Suffixes and names of the tables that list image or audio files and their labels."""

FILE_COLUMNS = ("file_name", "file", "filename", "path", "image", "audio")
LABEL_COLUMNS = ("label", "labels", "gold_label", "score", "class", "is_duplicate", "fine_label")

_PATH_LIKE = re.compile(r"[./~].*|.*\\.*|.*/.*/.*|.*\.(txt|jsonl?|csv|tsv|raw|tokens)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """An example: its name in error messages, a function that reads it, and its label in the source, if any."""

    name: str
    read: Callable[[], Any]
    label: Any = None


def locate(source: str | Path, what: str) -> Path | None:
    """The path of a source that is a file or folder; None for the name of a hub data set.

    `what` names the expected content in error messages. Raises `PermpruneError` for a path that does not exist.
    """
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or looks_like_path(source):
        raise PermpruneError(f"no {what} at {path}: give an existing file or folder, or the name of a hub data set")
    return None


def require_source(source: str) -> None:
    """Raise `PermpruneError` for a source that cannot be read, as far as its path tells: it is missing or empty."""
    named = (Path(source), Path(parse_name(source, "calibration")[0]))
    path = next((path for path in named if path.exists()), named[1])
    if not source.strip():
        raise PermpruneError("the name of the data is empty: give a file, a folder or the name of a hub data set")
    if not path.exists():
        if looks_like_path(source):
            raise PermpruneError(f"no data at {path}: give an existing file or folder, or the name of a hub data set")
    elif not os.access(path, os.R_OK):
        raise PermpruneError(f"cannot read {path}: {os.strerror(errno.EACCES)}")
    elif path.is_dir():
        if not any(path.iterdir()):
            raise PermpruneError(f"{path} is an empty folder: give one with data")
    elif not path.is_file():
        raise PermpruneError(f"{path} is neither a file nor a folder: give one of them")
    elif not path.stat().st_size:
        raise PermpruneError(f"{path} is empty: give a file with data")


def looks_like_path(source: str) -> bool:
    """Whether a source is written like a path, by its slashes or its suffix, and not like the name of a data set."""
    return _PATH_LIKE.fullmatch(source) is not None


def read_text(path: Path) -> str:
    """Read a UTF-8 file without translating line breaks. Raises `PermpruneError` if it cannot be read or decoded."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PermpruneError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise PermpruneError(f"cannot read {path}: {error.strerror}") from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl, .csv or .tsv file.

    The first row of a .csv or .tsv file is the header unless `columns` are given. Quotes have no special meaning in a
    .tsv file, as in those of GLUE. Raises `PermpruneError` if the file has another suffix, cannot be parsed or is
    empty.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise PermpruneError(
            f"{path} is not a table: give a {', '.join(TABLES[:-1])} or {TABLES[-1]} file, or the folder of the files"
        )
    text = read_text(path).removeprefix("\ufeff")
    if suffix == ".jsonl":
        rows = [_json_object(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        tabs = suffix == ".tsv"
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
    if not rows:
        raise PermpruneError(f"{path} has no rows: give a table that has some")
    return rows


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a .jsonl, .csv or .tsv file with a header; empty if the file cannot be read as one."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            if path.suffix == ".jsonl":
                row = json.loads(next((line for line in lines if line.strip()), ""))
                return row if isinstance(row, dict) else {}
            return next(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","), {})
    except (OSError, ValueError, RecursionError, csv.Error):
        return {}


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text; `place` names its location at the beginning of error messages.

    Raises `PermpruneError` if the text is invalid, exceeds Python's recursion limit, or contains a lone surrogate
    ("\\ud83d"), which tokenizers do not accept.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # escape sequence of a surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PermpruneError(f"{place}: half of a surrogate pair is not a character: remove it") from error
    except RecursionError as error:
        raise PermpruneError(f"{place}: JSON nested too deep: flatten it") from error
    except ValueError as error:
        raise PermpruneError(f"{place}: not JSON ({getattr(error, 'msg', error)})") from error
    return value


def find_column(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    """The first of the columns `names` that a row has. Raises `PermpruneError` if it has none of them."""
    found = next((name for name in names if name in row), None)
    if found is None:
        held = ", ".join(str(name) for name in row)
        raise PermpruneError(f"{place} has none of the columns {', '.join(names)}: it has {held}")
    return found


def list_files(folder: Path, suffixes: Iterable[str], what: str) -> list[Path]:
    """All files with these suffixes in a folder and its sub-folders, sorted. Raises `PermpruneError` if none exist."""
    kinds = set(suffixes)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    if not found:
        raise PermpruneError(f"{folder} holds no {what}: give a folder of {', '.join(sorted(kinds))} files")
    return found


def class_of(file: Path, folder: Path) -> str | None:
    """The class of a file in a folder with a sub-folder for each class: the sub-folder's name, or None."""
    *classes, _ = file.relative_to(folder).parts
    return classes[0] if classes else None


def find_list(path: Path) -> Path | None:
    """The table in a folder that lists its files, or `path` itself if it is a file; None if there is no such table."""
    if path.is_file():
        return path
    return next((file for name in LISTS for kind in TABLES if (file := path / f"{name}{kind}").is_file()), None)


def listed_items(table: Path, labels: Sequence[str], read: Callable[[Path], Any]) -> list[Item]:
    """The examples that a table lists, one per row.

    A row contains the path of a file, relative to the table's folder, in one of `FILE_COLUMNS`, and the label in one of
    the columns `labels`. `read` loads a file. Raises `PermpruneError` if a column or a file is missing.
    """
    files = listed_files(table)
    label = find_column(files[0][1], labels, str(table))
    return [Item(str(file), partial(read, file), row.get(label)) for file, row in files]


def listed_files(table: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files that a table lists, each with its row, as for `listed_items`."""
    rows = read_table(table)
    column = find_column(rows[0], FILE_COLUMNS, str(table))
    files = [(table.parent / str(row.get(column)), row) for row in rows]
    for file, row in files:
        if not file.is_file():
            raise PermpruneError(f"{table} lists {row.get(column)}, and there is no such file beside it")
    return files


def pick(keys: Sequence[str], part: Part, count: int, seed: int, shared: bool) -> list[int]:
    """Choose up to `count` examples of a part at random, and return their indices into `keys`, the examples' names.

    If both parts share the source, each gets a disjoint half of it, determined by the digests of the names and so
    independent of `seed` and `count`. Raises `PermpruneError` if no example is available or `count` is less than 1.
    """
    own = [at for at, key in enumerate(keys) if not shared or _half(key) == part]
    if not own or count < 1:
        raise PermpruneError(
            f"{count} of {len(own)} available examples for {part}: ask for at least 1, and give more data"
        )
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    return [own[at] for at in order[:count].tolist()]


def pick_items(items: Sequence[Item], path: Path, part: Part, count: int, seed: int, shared: bool) -> list[Item]:
    """Like `pick`, for the files of the folder or table `path`; their names are relative to the folder."""
    folder = path if path.is_dir() else path.parent
    keys = [Path(os.path.relpath(item.name, folder)).as_posix() for item in items]
    return [items[at] for at in pick(keys, part, count, seed, shared)]


def pick_rows(rows: Any, part: Part, count: int, seed: int, shared: bool) -> list[tuple[str, dict[str, Any]]]:
    """Like `pick`, for a streamed data set, which is shuffled within a buffer; returns (name, row) pairs."""
    rows = rows.map(lambda _, at: {ROW: f"row {at}"}, with_indices=True)
    if shared:
        rows = rows.filter(lambda row: _half(row[ROW]) == part)
    rows = rows.shuffle(seed=seed, buffer_size=max(BUFFER, 4 * count))
    picked = [(row.pop(ROW), row) for row in islice(rows, count)]
    if not picked:
        raise PermpruneError(f"the data set has no rows for {part}: give another split of it")
    return picked


def stored_file(cell: Any, place: str) -> io.BytesIO:
    """Open the image or audio file in a cell of a data set, stored in the cell or at a path or URL.

    Raises `PermpruneError` if the cell contains no file.
    """
    if isinstance(cell, dict) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, dict) and cell.get("path"):
        with fsspec.open(cell["path"], "rb") as file:
            return io.BytesIO(file.read())
    raise PermpruneError(f"{place} holds no file: give a data set with a column of images or of sound")


def parse_name(source: str, part: Part) -> tuple[str, str | None, str]:
    """Split "name:config@split" into name, configuration and split.

    The configuration is None if it is not given. The default split is "train" for calibration and "test" for
    evaluation.
    """
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return name, config or None, split or ("train" if part == "calibration" else "test")


def shares_rows(source: str, shared: bool) -> bool:
    """Whether both parts come from the same rows of a data set: only if it names a split; by default, splits differ."""
    return shared and "@" in source


@contextmanager
def dataset(source: str, part: Part) -> Iterator[Any]:
    """Context manager that streams the split of a hub data set; images and audio are not decoded.

    Errors from the datasets library inside the block are raised as `PermpruneError`.
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
    except Exception as error:  # datasets passes on errors of any type from its readers, fsspec and the network
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PermpruneError(
            f'"{name}" is not a file here, and its split "{split}" does not load as a data set: {reason}'
        ) from error


def class_names(rows: Any) -> dict[str, Sequence[str]]:
    """The names of the classes by number, of each column of a data set that holds classes."""
    columns = getattr(rows, "features", None) or {}
    return {column: kind.names for column, kind in columns.items() if getattr(kind, "names", None)}


def _half(key: str) -> Part:
    return "evaluation" if hashlib.sha256(key.encode()).digest()[0] % 2 else "calibration"


def _json_object(line: str, place: str) -> dict[str, Any]:
    row = parse_json(line, place)
    if not isinstance(row, dict):
        raise PermpruneError(f"{place}: not a JSON object")
    return row
