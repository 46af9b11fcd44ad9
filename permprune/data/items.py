"""Examples in folders and data sets: which are chosen, how images and sound are read, and their labels."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from permprune.data.sources import Row, class_names, dataset, find_column, locate, read_table
from permprune.errors import PermpruneError
from permprune.examples import Part

BUFFER = 1000
"""Minimum size, in rows, of the buffer for shuffling a streamed data set."""

SHOWN = 5
"""Maximum number of class names in an error message."""

NUMBER = "__number__"
"""A temporary column for the numbers of a data set's rows."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
"""Tables in a folder that list its files in a column `FILE` and describe them, as in the folders of datasets."""

FILE = "file_name"


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

    def rows(self, rows: Any) -> list[tuple[str, dict[str, Any]]]:
        """Like `indices`, for a streamed data set, which is shuffled within a buffer; returns (name, row) pairs."""
        rows = rows.map(lambda _, index: {NUMBER: f"row {index}"}, with_indices=True)
        if self.shared:
            rows = rows.filter(lambda row: self.takes(row[NUMBER]))
        rows = rows.shuffle(seed=self.seed, buffer_size=max(BUFFER, 4 * self.count))
        picked = [(row.pop(NUMBER), row) for row in islice(rows, self.count)]
        if not picked:
            raise PermpruneError(f"the data set has no rows for {self.part}: give another split of it")
        return picked

    def takes(self, key: str) -> bool:
        """Whether an example of this name belongs to the part."""
        odd = hashlib.sha256(key.encode()).digest()[0] % 2
        return not self.shared or odd == (self.part == "evaluation")


@dataclass(frozen=True)
class Item:
    """An example: its name in error messages, a function that reads it, and what the source says of it.

    `row` holds the other columns of its row, and `classes` the names of the classes of those that hold classes.
    """

    name: str
    read: Callable[[], Any]
    row: Row
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def label(self, columns: Sequence[str], labels: Labels | None = None) -> Any:
        """The value of the first of the `columns` that there is, as `labels.named`; None if there is none."""
        column = next((name for name in columns if name in self.row), "")
        label, names = self.row.get(column), self.classes.get(column)
        return label if labels is None or names is None else labels.named(label, names)


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

    def items(self, source: str | Path, selection: Selection) -> list[Item]:
        """Return the examples that are chosen of a source.

        It is a folder with one of the tables `METADATA`, or else with a sub-folder for each class, whose name becomes
        the column "label", or a data set. Raises `PermpruneError` if the source cannot be read.
        """
        path = locate(source, self.name)
        if path is None:
            return self._of_data_set(str(source), selection)
        if not path.is_dir():
            raise PermpruneError(f"{path} is a file: give the folder of the {self.name}")
        files = self._described(path)
        keys = [Path(os.path.relpath(file, path)).as_posix() for file, _ in files]
        chosen = [files[index] for index in selection.indices(keys)]
        return [Item(str(file), partial(self.decode, file, str(file)), row) for file, row in chosen]

    def _described(self, folder: Path) -> list[tuple[Path, Row]]:
        """The files of the kind in a folder, each with its row in the table of the folder, or its class."""
        if table := find_metadata(folder):
            rows = read_table(table)
            files = [folder / str(row[find_column(row, [FILE], str(table))]) for row in rows]
            if missing := next((file for file in files if not file.is_file()), None):
                raise PermpruneError(f"{table} lists {missing.name}, and there is no such file beside it")
            return list(zip(files, rows, strict=True))
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        if not paths:
            raise PermpruneError(f"{folder} holds no {self.name}: give a folder of {', '.join(self.suffixes)} files")
        classes = [path.relative_to(folder).parts[:-1] for path in paths]
        return [(path, {"label": names[0]} if names else {}) for path, names in zip(paths, classes, strict=True)]

    def _of_data_set(self, source: str, selection: Selection) -> list[Item]:
        """Return the examples that are chosen of a data set. Raises `PermpruneError` for a row without a file."""
        with dataset(source, selection.part) as rows:
            names, items = class_names(rows), []
            for name, row in selection.of_data_set(source).rows(rows):
                place = f"{source}, {name}"
                stored = _stored_file(row[find_column(row, self.columns, source)], place)
                items.append(Item(place, partial(self.decode, stored, place), row, names))
        return items


def find_metadata(folder: Path) -> Path | None:
    """The table of a folder that describes its files; None if there is none."""
    return next((file for name in METADATA if (file := folder / name).is_file()), None)


def _stored_file(cell: Any, place: str) -> io.BytesIO:
    """Open the file in a cell of a data set, stored in the cell or at a path or URL."""
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

        `place` names the example in error messages. Raises `PermpruneError` if the label is missing or unknown to the
        model, or a score is not finite.
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
        """Convert a source's class number to the class name, if the model has all of the source's class `names`.

        The source and the model may number the same classes differently. Otherwise returns `label` unchanged.
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
