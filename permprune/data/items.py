"""Examples in files, tables and data sets: which are chosen, how images and sound are read, and their labels."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from permprune.data.sources import LISTED, class_names, dataset, find_column, locate, read_table
from permprune.errors import PermpruneError
from permprune.examples import Part

BUFFER = 1000
"""Minimum size, in rows, of the buffer for shuffling a streamed data set."""

SHOWN = 5
"""Maximum number of class names in an error message."""

ROW = "__row__"
"""A temporary column for the names of a data set's rows."""

LISTS = ("labels", "metadata", "transcripts")
"""Names, without suffix, of the tables that list image or audio files and their labels."""

FILE_COLUMNS = ("file_name", "file", "filename", "path", "image", "audio")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """An example: its name in error messages, a function that reads it, and its label in the source, if any."""

    name: str
    read: Callable[[], Any]
    label: Any = None


@dataclass(frozen=True)
class Selection:
    """Which examples of a source are used: up to `count` of a `part`, chosen at random by `seed`.

    With `shared`, the calibration and the evaluation part come from the same source, and each gets a disjoint half of
    it, determined by the digests of the examples' names and so independent of `seed` and `count`.
    """

    part: Part
    count: int
    seed: int = 0
    shared: bool = False

    def of_data_set(self, source: str) -> Selection:
        """The selection from a data set: the parts share rows only if `source` names a split; default splits differ."""
        return replace(self, shared=self.shared and "@" in source)

    def indices(self, keys: Sequence[str]) -> list[int]:
        """Choose examples, and return their indices into `keys`, the examples' names.

        Raises `PermpruneError` if no example is available or `count` is less than 1.
        """
        available = [index for index, key in enumerate(keys) if self.takes(key)]
        if not available or self.count < 1:
            raise PermpruneError(
                f"{self.count} of {len(available)} available examples for {self.part}: ask for at least 1, and give "
                "more data"
            )
        order = torch.randperm(len(available), generator=torch.Generator().manual_seed(self.seed))
        return [available[place] for place in order[: self.count].tolist()]

    def files(self, items: Sequence[Item], path: Path) -> list[Item]:
        """Like `indices`, for the files of the folder or table `path`; their names are relative to the folder."""
        folder = path if path.is_dir() else path.parent
        keys = [Path(os.path.relpath(item.name, folder)).as_posix() for item in items]
        return [items[index] for index in self.indices(keys)]

    def rows(self, rows: Any) -> list[tuple[str, dict[str, Any]]]:
        """Like `indices`, for a streamed data set, which is shuffled within a buffer; returns (name, row) pairs."""
        rows = rows.map(lambda _, index: {ROW: f"row {index}"}, with_indices=True)
        if self.shared:
            rows = rows.filter(lambda row: self.takes(row[ROW]))
        rows = rows.shuffle(seed=self.seed, buffer_size=max(BUFFER, 4 * self.count))
        picked = [(row.pop(ROW), row) for row in islice(rows, self.count)]
        if not picked:
            raise PermpruneError(f"the data set has no rows for {self.part}: give another split of it")
        return picked

    def takes(self, key: str) -> bool:
        """Whether an example of this name belongs to the part."""
        odd = hashlib.sha256(key.encode()).digest()[0] % 2
        return not self.shared or odd == (self.part == "evaluation")


@dataclass(frozen=True)
class Medium:
    """A kind of files with one example each, images or sound.

    `name` is the kind's name in error messages, `suffixes` are those of its files, and `columns` those of a data set
    that hold them. `decode` reads a file, given its path or its contents, and its name in error messages.
    """

    name: str
    suffixes: tuple[str, ...]
    columns: tuple[str, ...]
    decode: Callable[[Path | io.BytesIO, str], Any]

    def item(self, file: Path, label: Any) -> Item:
        """The example in a file."""
        return Item(str(file), partial(self.decode, file, str(file)), label)

    def files(self, folder: Path) -> list[Path]:
        """All files of the kind in a folder and its sub-folders, sorted. Raises `PermpruneError` if none exist."""
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        if not paths:
            raise PermpruneError(f"{folder} holds no {self.name}: give a folder of {', '.join(self.suffixes)} files")
        return paths

    def labelled(
        self,
        source: str | Path,
        selection: Selection,
        columns: Sequence[str],
        labels: Labels | None,
        of_folder: Callable[[Path], list[Item]] | None = None,
    ) -> list[Item]:
        """Return the examples that are chosen of a source, with their labels in the first of the `columns`.

        The source is a table (`listed_files`), a folder with one or else with a sub-folder for each class, or a data
        set. `of_folder` reads folders without a table in another way. With `labels`, the numbers of a data set's
        classes become their names. Raises `PermpruneError` if the source cannot be read.
        """
        path = locate(source, self.name)
        if path is None:
            return self.rows(str(source), selection, lambda row, _, names: _row_label(row, columns, names, labels))
        if table := find_list(path):
            files = listed_files(table)
            label = find_column(files[0][1], columns, str(table))
            items = [self.item(file, row.get(label)) for file, row in files]
        elif of_folder is not None:
            items = of_folder(path)
        else:
            items = [self.item(file, _class_of(file, path)) for file in self.files(path)]
        return selection.files(items, path)

    def rows(
        self, source: str, selection: Selection, label_of: Callable[[Row, str, Mapping[str, Sequence[str]]], Any]
    ) -> list[Item]:
        """Return the examples that are chosen of a data set.

        `label_of(row, place, names)` is the label of a row; `place` names the row in error messages, and `names` are
        the names of the classes by column (`class_names`). Raises `PermpruneError` for a row without a file.
        """
        with dataset(source, selection.part) as rows:
            names, items = class_names(rows), []
            for name, row in selection.of_data_set(source).rows(rows):
                place = f"{source}, {name}"
                stored = _stored_file(row[find_column(row, self.columns, source)], place)
                items.append(Item(place, partial(self.decode, stored, place), label_of(row, place, names)))
        return items


def _class_of(file: Path, folder: Path) -> str | None:
    """The class of a file in a folder with a sub-folder for each class: the sub-folder's name, or None."""
    *classes, _ = file.relative_to(folder).parts
    return classes[0] if classes else None


def find_list(path: Path) -> Path | None:
    """The table in a folder that lists its files, or `path` itself if it is a file; None if there is no such table."""
    if path.is_file():
        return path
    return next((file for name in LISTS for kind in LISTED if (file := path / f"{name}{kind}").is_file()), None)


def listed_files(table: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files that a table lists, each with its row.

    A row contains the path of a file, relative to the table's folder, in one of `FILE_COLUMNS`. Raises `PermpruneError`
    if the column or a file is missing.
    """
    rows = read_table(table)
    column = find_column(rows[0], FILE_COLUMNS, str(table))
    files = [(table.parent / str(row.get(column)), row) for row in rows]
    for file, row in files:
        if not file.is_file():
            raise PermpruneError(f"{table} lists {row.get(column)}, and there is no such file beside it")
    return files


def _stored_file(cell: Any, place: str) -> io.BytesIO:
    """Open the file in a cell of a data set, stored in the cell or at a path or URL.

    Raises `PermpruneError` if the cell contains no file.
    """
    if isinstance(cell, dict) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, dict) and cell.get("path"):
        with fsspec.open(cell["path"], "rb") as file:
            return io.BytesIO(file.read())
    raise PermpruneError(f"{place} holds no file: give a data set with a column of images or of sound")


class Labels:
    """Converts labels to the class numbers of a model's config (`id2label`), or to scores if it has one output."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.names: dict[int, str] = {int(number): str(name) for number, name in (config.id2label or {}).items()}
        self.numbers = {name.casefold(): number for number, name in self.names.items()}

    def read(self, label: Any, place: str) -> float:
        """Convert a label, the name or number of a class, to the class number; for a model with one output, to a score.

        Names are compared without regard to case. `place` names the example in error messages. Raises `PermpruneError`
        if the label is missing or unknown to the model, or a score is not finite.
        """
        text = "" if label is None else str(label).strip()
        if not text or (text == "-1" and len(self.names) > 1):
            raise PermpruneError(
                f"{place} has no label: give labelled data, such as NAME@validation for a split of a data set"
            )
        number: float | None = self.numbers.get(text.casefold())
        if number is None:
            number = self._number({"true": "1", "false": "0"}.get(text.casefold(), text))
        if number is None:
            shown = ", ".join(list(self.names.values())[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
            known = "scores" if len(self.names) == 1 else f"{shown} (0 to {len(self.names) - 1})"
            raise PermpruneError(f'{place} has the label "{text}", which the model does not know: it knows {known}')
        return number

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Convert the labels of examples with `read`: int64 (count,), or fp32 (count,) for scores."""
        dtype = torch.float32 if len(self.names) == 1 else torch.int64
        return torch.tensor([self.read(*pair) for pair in zip(labels, places, strict=True)], dtype=dtype)

    def named(self, label: Any, names: Sequence[str]) -> Any:
        """Convert a data set's class number to the class name, if the model has all of the data set's class `names`.

        The data set and the model may number the same classes differently. Otherwise returns `label` unchanged.
        """
        known = all(name.casefold() in self.numbers for name in names)
        return names[label] if known and isinstance(label, int) and 0 <= label < len(names) else label

    def _number(self, text: str) -> float | None:
        number = as_number(text)
        if len(self.names) == 1:
            return number if number is not None and math.isfinite(number) else None
        return int(number) if number in self.names else None


def as_number(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _row_label(
    row: Mapping[str, Any], columns: Sequence[str], names: Mapping[str, Sequence[str]], labels: Labels | None
) -> Any:
    """The label in the first of the `columns` that a data set's row has; None if it has none of them.

    `names` are the names of the classes by column; with `labels`, numbers of classes are converted to their names.
    """
    column = next((name for name in columns if name in row), "")
    label = row.get(column)
    return labels.named(label, names[column]) if labels and column in names else label
