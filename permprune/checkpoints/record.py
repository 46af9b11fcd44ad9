"""The record of a pruned model, `permprune.json`: one schema for all that read or write it."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from permprune.checkpoints.gathers import Gather, Order
from permprune.checkpoints.schema import Malformed, decode, encode
from permprune.errors import PermpruneError
from permprune.models.layers import DenseWeights
from permprune.options import Range, Share
from permprune.pattern import Pattern

RECORD = "permprune.json"

FORMAT = 1
"""The format that is written, and the newest that is read. New keys with defaults are no new format."""

ADVICE = "copy it again, or prune the model again"


Format = Annotated[int, Range(FORMAT, FORMAT)]
Flag = Annotated[int, Range(0, 1)]
GroupSize = Annotated[int, Range(2, 10**6)]
Percentage = Annotated[int, Range(0, 100)]
Count = Annotated[int, Range(0, 10**15)]
Seconds = Annotated[float, Range(0, 1e12)]
Value = Annotated[float, Range(-1e300, 1e300)]
"""A measured value, in a range that pictures can show."""

Plain = str | int | float | bool | None


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer: its pattern, and what the mask keeps of the squared saliency and does to the output.

    "_none" is natural order. `transposed` tells whether the weight is stored as (inputs, outputs).
    """

    name: str
    transposed: bool
    pattern: str
    kept: Value
    error: Value
    kept_none: Value
    error_none: Value

    def __post_init__(self) -> None:
        try:
            Pattern.parse(self.pattern)
        except PermpruneError:
            raise Malformed(f"pattern is {reprlib.repr(self.pattern)}, which is no N:M pattern") from None


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of the search (`CurvePoint`)."""

    round: Count
    loss: Value
    kept: bool
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class Measured:
    """The value of a metric of the dense model, of the model pruned in natural order, and as it is.

    `overlap` is the share of the data that was calibrated on as well (`permprune.data.overlap`); None if unknown.
    """

    data: str
    metric: str
    dense: Value
    none: Value
    pruned: Value
    count: Count
    unit: str
    overlap: Share | None = None

    def __post_init__(self) -> None:
        _check_metric(self.metric, [self.dense, self.none, self.pruned])


@dataclasses.dataclass(frozen=True)
class Cells:
    """Rows of weights: their scores in percent, and 1 where they are kept (`sample`)."""

    score: list[list[Percentage]]
    kept: list[list[Flag]]

    def __post_init__(self) -> None:
        shapes = {(len(rows), *map(len, rows)) for rows in (self.score, self.kept)}
        if len(shapes) > 1 or len(set(map(len, self.score))) != 1 or not self.score[0]:
            raise Malformed("score and kept must be tables of the same size")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A few weights of a layer in natural order and as permuted."""

    layer: str
    m: GroupSize
    kept_none: Value
    kept: Value
    natural: Cells
    permuted: Cells


@dataclasses.dataclass(frozen=True)
class Epoch:
    """An epoch of training after pruning, with what was measured after it."""

    epoch: Count
    loss: Value | None
    value: Value
    seconds: Seconds
    held_out: Value | None = None


@dataclasses.dataclass(frozen=True)
class Optimised:
    """What training after pruning did: a metric before and after; its options are among the extra keys."""

    train: str
    examples: Count
    metric: str
    before: Value
    after: Value
    stderr: Value | None
    dense: Value | None
    count: Count
    unit: str
    curve: list[Epoch]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        dense = [] if self.dense is None else [self.dense]
        _check_metric(self.metric, [self.before, self.after, *dense, *(epoch.value for epoch in self.curve)])


@dataclasses.dataclass(frozen=True)
class Record:
    """How a model was pruned, and what came of it.

    `model` is the name of the dense one, `settings` the fields of `PruneConfig` and the permuter's name as "permute".
    `permutations` are the tables folded into the weights, by space, `gathers` those that a loader puts back. `dense` is
    what stayed dense inside the blocks, None where it was not recorded. What was not measured is None. Keys that this
    version does not know are kept in `extra`.
    """

    format: Format
    version: str
    model: str
    note: str | None
    settings: dict[str, Plain | list[Plain]]
    versions: dict[str, str]
    layers: list[PrunedLayer]
    curve: list[Round]
    permutations: dict[str, list[Order]]
    gathers: list[Gather]
    dense: DenseWeights | None = None
    sample: Sample | None = None
    measured: Measured | None = None
    gap_closed: Value | None = None
    seconds: dict[str, Seconds | None] = dataclasses.field(default_factory=dict)
    peak_memory_mb: Value | None = None
    optimised: Optimised | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings.setdefault("update", "none")
        if wrong := [key for key in ("pattern", "permute", "update") if not isinstance(self.settings.get(key), str)]:
            raise Malformed(f"settings.{wrong[0]} must be a text")
        for name, table in self.permutations.items():
            if not table or len(set(map(len, table))) > 1:
                raise Malformed(f"the blocks of {name} in permutations must be of one size")
        _check_unique("layers", [layer.name for layer in self.layers])
        _check_unique("gathers at the", [" of ".join(place) for gather in self.gathers for place in gather.places])

    @classmethod
    def of(cls, values: object) -> Record:
        """The record that parsed JSON holds. Raises `Malformed`."""
        record: Record = decode(cls, values)
        return record

    def to_json(self) -> dict[str, Any]:
        """The contents of the file, but for infinities and NaN, which are written as null."""
        values: dict[str, Any] = encode(self)
        return values


def read_record(folder: str | Path) -> Record:
    """The record in a folder, checked. Raises `PermpruneError` when there is none, or it is damaged or too new."""
    path = Path(folder) / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        _require_format(path, values)
        return Record.of(values)
    except FileNotFoundError as error:
        raise PermpruneError(f"{folder} holds no {RECORD}: give a folder that permprune wrote") from error
    except RecursionError as error:
        raise PermpruneError(f"{path} is damaged (it is nested too deeply): {ADVICE}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PermpruneError(f"{path} is damaged ({reason}): {ADVICE}") from error


def _require_format(path: Path, values: object) -> None:
    """Refuse a record of a later format, of which nothing else is known."""
    if isinstance(values, dict) and isinstance(number := values.get("format"), int) and number > FORMAT:
        number, version = map(reprlib.repr, (number, values.get("version")))
        raise PermpruneError(f"{path} is of format {number}, written by permprune {version}: upgrade permprune")


def _check_metric(metric: str, values: list[float]) -> None:
    if metric == "perplexity" and any(value < 0.99 for value in values):
        raise Malformed("a perplexity is less than 1")


def _check_unique(what: str, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise Malformed(f"there are two {what} {twice[0]!r}")
