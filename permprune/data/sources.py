"""Sources of examples: text files, tables and data sets. The library datasets reads all but plain text and JSON."""

from __future__ import annotations

import csv
import errno
import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from permprune.errors import PermpruneError, first_line
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.examples import Part

Row = Mapping[str, Any]

JSON = (".jsonl", ".json")
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
}
"""The format and the options that datasets reads tables with, by suffix.

Quotes have no special meaning in a .tsv file, as in those of GLUE.
"""

TABLES = (*FORMATS, *JSON)
"""Suffixes of tables."""

LABEL_COLUMNS = ("label", "labels", "gold_label", "score", "class", "is_duplicate", "fine_label")

PROMPTS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "answers", "response", "completion", "output")
"""Columns of prompts and of their answers."""

MAX_ROWS = 1_000_000
"""Maximum number of rows that are read at once."""

_PATH_LIKE = re.compile(r"[./~].*|.*\\.*|.*/.*/.*|.*\.(txt|jsonl?|csv|tsv|parquet|raw|tokens)", re.DOTALL)
"""Matches what is written like a path, by its slashes or its suffix, and not like the name of a data set."""


def locate(source: str | Path, what: str) -> Path | None:
    """The path of a source that is a file or folder; None for the name of a data set or a folder with a split.

    `what` names the expected content in error messages. Raises `PermpruneError` for a path that does not exist.
    """
    path, (name, _, _) = Path(source), parse_name(str(source), "evaluation")
    if path.exists():
        return path
    if not Path(name).is_dir() and (isinstance(source, Path) or _PATH_LIKE.fullmatch(name)):
        raise PermpruneError(f"no {what} at {path}: give an existing file or folder, or the name of a hub data set")
    return None


def require_source(source: str) -> None:
    """Raise `PermpruneError` for a source that cannot be read, as far as its path tells: it is missing or empty."""
    if not source.strip():
        raise PermpruneError("the name of the data is empty: give a file, a folder or the name of a hub data set")
    path = locate(source, "data") or Path(parse_name(source, "calibration")[0])
    if not path.exists():  # the name of a data set
        return
    if not os.access(path, os.R_OK):
        raise PermpruneError(f"cannot read {path}: {os.strerror(errno.EACCES)}")
    if path.is_dir():
        if not any(path.iterdir()):
            raise PermpruneError(f"{path} is an empty folder: give one with data")
    elif not path.is_file():
        raise PermpruneError(f"{path} is neither a file nor a folder: give one of them")
    elif not path.stat().st_size:
        raise PermpruneError(f"{path} is empty: give a file with data")


def parse_name(source: str, part: Part) -> tuple[str, str | None, str]:
    """Split "name:config@split" into name, configuration and split.

    The configuration is None if it is not given. The default split is "train" for calibration and "test" for
    evaluation.
    """
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return name, config or None, split or ("train" if part == "calibration" else "test")


def read_text(path: Path) -> str:
    """Read a UTF-8 file without translating line breaks. Raises `PermpruneError` if it cannot be read or decoded."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PermpruneError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise PermpruneError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def dataset(source: str, part: Part) -> Iterator[Any]:
    """Context manager that reads the rows of a table, or streams those of the split of a data set.

    Images and audio in a data set are not decoded. Errors from the datasets library inside the block are raised as
    `PermpruneError`.
    """
    if Path(source).is_file():
        yield read_table(Path(source))
        return
    import datasets

    name, config, split = parse_name(source, part)
    with _failing(f'"{name}" is not a file here, and its split "{split}" does not load as a data set'):
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for column, kind in (getattr(rows, "features", None) or {}).items():
            if getattr(kind, "decode", False):
                rows = rows.cast_column(column, replace(kind, decode=False))
        yield rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table. Raises `PermpruneError` if the file has another suffix or cannot be parsed."""
    suffix = path.suffix.lower()
    if suffix in JSON:
        return _json_rows(path)
    if suffix not in FORMATS:
        kinds = f"{', '.join(TABLES[:-1])} or {TABLES[-1]}"
        raise PermpruneError(f"{path} is not a table: give a {kinds} file, or the folder of the files")
    import datasets

    name, options = FORMATS[suffix]
    with _failing(f"{path} does not load as a table"):
        files = glob.escape(str(path))
        return list(datasets.load_dataset(name, data_files=files, split="train", streaming=True, **options))


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Context manager that raises errors of datasets as `PermpruneError`; `what` says what fails."""
    logger = logging.getLogger("datasets")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs what it also raises
    try:
        yield
    except PermpruneError:
        raise
    except Exception as error:  # datasets passes on errors of any type from its readers, fsspec and the network
        raise PermpruneError(f"{what}: {first_line(error)}") from error
    finally:
        logger.setLevel(before)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json file, which is a list of objects, or of a .jsonl file with an object in each line.

    The parser that datasets uses crashes on deeply nested JSON, and does not say in which line an error is.
    """
    text = read_text(path).removeprefix("\ufeff")
    if path.suffix.lower() == ".json":
        rows = _parsed(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise PermpruneError(f"{path} is not a list of JSON objects: write one object for each row")
        return rows
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [_parsed(line, place) for place, line in lines]
    if bad := next((place for (place, _), row in zip(lines, rows, strict=True) if not isinstance(row, dict)), None):
        raise PermpruneError(f"{bad}: not a JSON object")
    return rows


def _parsed(text: str, place: str) -> Any:
    """Parse a JSON text without lone surrogates ("\\ud83d"), which tokenizers do not accept."""
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


def read_rows(source: str | Path, part: Part) -> tuple[list[dict[str, Any]], Mapping[str, Sequence[str]]]:
    """Read the rows of a table or data set, and the names of the classes by number, of its columns that hold classes.

    Raises `PermpruneError` if it cannot be read or has no rows.
    """
    with dataset(str(source), part) as rows:
        names, held = class_names(rows), list(islice(rows, MAX_ROWS))
    if not held:
        raise PermpruneError(f"{source} has no rows: give a table or a split that has some")
    return held, names


def columns_of(source: str, part: Part) -> Row:
    """A mapping by the columns of a table or data set, which is empty for other sources and those that do not exist.

    Raises `PermpruneError` if the source does not load.
    """
    path, (name, _, _) = Path(source), parse_name(source, part)
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            return {}
    elif _PATH_LIKE.fullmatch(name) and not Path(name).is_dir():
        return {}
    with dataset(source, part) as rows:
        columns: Row = getattr(rows, "features", None) or next(iter(rows), {})
        return columns


def class_names(rows: Any) -> dict[str, Sequence[str]]:
    """The names of the classes by number, of each column of a data set that holds classes."""
    columns = getattr(rows, "features", None) or {}
    return {column: kind.names for column, kind in columns.items() if getattr(kind, "names", None)}


def find_column(row: Row, names: Sequence[str], place: str) -> str:
    """The first of the columns `names` that a row has. Raises `PermpruneError` if it has none of them."""
    column = next((name for name in names if name in row), None)
    if column is None:
        held = ", ".join(str(name) for name in row)
        raise PermpruneError(f"{place} has none of the columns {', '.join(names)}: it has {held}")
    return column
