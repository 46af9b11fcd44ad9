"""Sources of examples: paths, texts, tables and hub data sets."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from permprune.errors import PermpruneError, first_line
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from permprune.examples import Part

LISTED = (".csv", ".tsv", ".jsonl")
TABLES = (*LISTED, ".json", ".parquet")
"""Suffixes of the tables that list files, and of all tables."""

LABEL_COLUMNS = ("label", "labels", "gold_label", "score", "class", "is_duplicate", "fine_label")

PROMPTS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "answers", "response", "completion", "output")
"""Columns of prompts and of their answers."""

_PATH_LIKE = re.compile(r"[./~].*|.*\\.*|.*/.*/.*|.*\.(txt|jsonl?|csv|tsv|parquet|raw|tokens)", re.DOTALL)


def locate(source: str | Path, what: str) -> Path | None:
    """The path of a source that is a file or folder; None for the name of a data set or a folder with a split.

    `what` names the expected content in error messages. Raises `PermpruneError` for a path that does not exist.
    """
    path, (name, _, _) = Path(source), parse_name(str(source), "evaluation")
    if path.exists():
        return path
    if not Path(name).is_dir() and (isinstance(source, Path) or looks_like_path(name)):
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
    """Read the rows of a .jsonl, .json, .parquet, .csv or .tsv file.

    The first row of a .csv or .tsv file is the header unless `columns` are given. Quotes have no special meaning in a
    .tsv file, as in those of GLUE. A .json file is a list of objects. Raises `PermpruneError` if the file has another
    suffix, cannot be parsed or is empty.
    """
    match path.suffix.lower():
        case ".jsonl":
            rows = _json_lines(path)
        case ".json":
            rows = parse_json(read_text(path).removeprefix("\ufeff"), str(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise PermpruneError(f"{path} is not a list of JSON objects: write one object for each row")
        case ".parquet":
            rows = _parquet_rows(path)
        case ".csv" | ".tsv" as suffix:
            rows = _separated_rows(path, "\t" if suffix == ".tsv" else ",", columns)
        case _:
            kinds = f"{', '.join(TABLES[:-1])} or {TABLES[-1]}"
            raise PermpruneError(f"{path} is not a table: give a {kinds} file, or the folder of the files")
    if not rows:
        raise PermpruneError(f"{path} has no rows: give a table that has some")
    return rows


def _separated_rows(path: Path, separator: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""),
        columns,
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
    )
    try:
        return list(reader)
    except csv.Error as error:
        raise PermpruneError(f"{path}, line {reader.line_num}: {error}; write the table as .jsonl") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PermpruneError(f"{path} is not a Parquet file: {first_line(error)}") from error
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise PermpruneError(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def first_row(path: Path) -> Mapping[str, Any]:
    """The first row of a table with a header; empty if the file cannot be read as one."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".parquet"):
            return read_table(path)[0]
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if suffix == ".jsonl":
                row = json.loads(next((line for line in lines if line.strip()), ""))
                return row if isinstance(row, dict) else {}
            return next(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","), {})
    except (PermpruneError, OSError, ValueError, RecursionError, csv.Error):
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
    column = next((name for name in names if name in row), None)
    if column is None:
        held = ", ".join(str(name) for name in row)
        raise PermpruneError(f"{place} has none of the columns {', '.join(names)}: it has {held}")
    return column


def parse_name(source: str, part: Part) -> tuple[str, str | None, str]:
    """Split "name:config@split" into name, configuration and split.

    The configuration is None if it is not given. The default split is "train" for calibration and "test" for
    evaluation.
    """
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return name, config or None, split or ("train" if part == "calibration" else "test")


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
        raise PermpruneError(
            f'"{name}" is not a file here, and its split "{split}" does not load as a data set: {first_line(error)}'
        ) from error


def columns_of(source: str, part: Part) -> Mapping[str, Any]:
    """A mapping by the columns of a table or data set, which is empty for other sources and those that do not exist.

    Raises `PermpruneError` if a data set does not load.
    """
    path, (name, _, _) = Path(source), parse_name(source, part)
    if path.is_file():
        return first_row(path) if path.suffix.lower() in TABLES else {}
    if looks_like_path(name) and not Path(name).is_dir():
        return {}
    with dataset(source, part) as rows:
        columns: Mapping[str, Any] = getattr(rows, "features", None) or next(iter(rows), {})
        return columns


def class_names(rows: Any) -> dict[str, Sequence[str]]:
    """The names of the classes by number, of each column of a data set that holds classes."""
    columns = getattr(rows, "features", None) or {}
    return {column: kind.names for column, kind in columns.items() if getattr(kind, "names", None)}
