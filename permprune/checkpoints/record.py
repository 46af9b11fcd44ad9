"""The record of a pruned model, the file `permprune.json`: the schema, and reading it."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from permprune.checkpoints.benchmark import Benchmark, Bytes
from permprune.checkpoints.gathers import Gather, Order
from permprune.checkpoints.schema import Malformed, decode, encode
from permprune.errors import PermpruneError
from permprune.models.layers import DenseWeights
from permprune.options import MOST, Range, Share
from permprune.pattern import DENSE, Pattern

RECORD = "permprune.json"

FORMAT = 1
"""The format version that is written, and the newest that can be read. New keys with defaults do not change it."""

PACKED = "packed"
"""The key of the entry for packed weights: their `dtype` and `head`, and the `gathers` that they contain."""

ADVICE = "copy it again, or prune the model again"


Format = Annotated[int, Range(FORMAT, FORMAT)]
Flag = Annotated[int, Range(0, 1)]
GroupSize = Annotated[int, Range(2, 10**6)]
Percentage = Annotated[int, Range(0, 100)]
Count = Annotated[int, Range(0, 10**15)]
Seconds = Annotated[float, Range(0, 1e12)]
Value = Annotated[float, Range(-1e300, 1e300)]
"""A measured value; the range is what charts can display."""

Plain = str | int | float | bool | None

SIDES = ("dense", "none", "pruned")
"""The models that are compared: the dense one, the one pruned in natural order, and the pruned one."""

Rate = Annotated[float, Range(0, 1e12, open=True)]


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer: its pattern and the effect of pruning.

    `kept` is the fraction of the squared saliency that belongs to nonzero weights, and `error` the relative squared
    error of the layer's output on the dense model's inputs. `kept_none` and `error_none` are the same for pruning
    without a permutation. `transposed` tells whether the weight is stored as (inputs, outputs).
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
            raise Malformed(f"pattern is {reprlib.repr(self.pattern)}, which is not an N:M pattern") from None


@dataclasses.dataclass(frozen=True)
class RecordedRound:
    """One round of the search, or of training between its rounds (see `CurvePoint`)."""

    round: Count
    loss: Value
    kept: bool
    seconds: Seconds
    stage: str = "search"


@dataclasses.dataclass(frozen=True)
class Other:
    """Another metric of what was measured, with its values for the same three models."""

    metric: str
    dense: Value
    none: Value
    pruned: Value


@dataclasses.dataclass(frozen=True)
class Measured:
    """The value of a metric for the dense model, the model pruned without a permutation, and the pruned model.

    `count` is the number of predictions and `unit` what they are. `overlap` is the fraction of the evaluation data that
    also occurs in the calibration data (see `permprune.data.overlap`); None if unknown. `packed` is the type of the
    packed weights that `pruned` holds for; None if it was measured before they were packed.
    """

    data: str
    metric: str
    dense: Value
    none: Value
    pruned: Value
    count: Count
    unit: str
    overlap: Share | None = None
    others: list[Other] = dataclasses.field(default_factory=list)
    packed: str | None = None

    def __post_init__(self) -> None:
        _check_metric(self.metric, [self.dense, self.none, self.pruned])


@dataclasses.dataclass(frozen=True)
class Cells:
    """Scores in percent of a matrix of weights, and 1 where one is kept, else 0 (see `engine.pruned.sample`)."""

    score: list[list[Percentage]]
    kept: list[list[Flag]]

    def __post_init__(self) -> None:
        shapes = {(len(rows), *map(len, rows)) for rows in (self.score, self.kept)}
        if len(shapes) > 1 or len(set(map(len, self.score))) != 1 or not self.score[0]:
            raise Malformed("score and kept must be tables of the same size")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A few weights of a layer, in natural and in permuted order; `kept` and `kept_none` are the layer's."""

    layer: str
    m: GroupSize
    kept_none: Value
    kept: Value
    natural: Cells
    permuted: Cells


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch of training after pruning.

    `loss` is the mean training loss (None before the first epoch), `value` the metric after the epoch, `held_out` the
    loss on the held-out examples (None if not measured), and `seconds` the time since training began.
    """

    epoch: Count
    loss: Value | None
    value: Value
    seconds: Seconds
    held_out: Value | None = None


@dataclasses.dataclass(frozen=True)
class Optimised:
    """The result of training after pruning: a metric before and after it.

    `train` selects the trained weights, `examples` is the number of training examples, `dense` the metric of the
    teacher (None without one), and `count` and `unit` are those of `Measured`. The training options are in `extra`.
    """

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
    """How a model was pruned, and the results.

    `model` is the name of the dense model. `settings` are the fields of `PruneConfig`, with the permuter as "order".
    `permutations` are the tables folded into the weights, by space, and `gathers` the permutations that have to be
    applied at run time. `reordered` are the outputs beside the logits whose channels are in a new order, each with the
    names of its spaces in `permutations`. `dense` lists the weights inside the blocks that stayed dense; None if it was
    not recorded. `bench` is the result of `permprune bench`. `base_model` is the dense model's hub id and `license` its
    licence, as its card or config states it; None if unknown. `digests` are those of the tensors of the written weights
    (see `weight_digests`), by name; empty for a model in memory, and in records of earlier releases. `showcase` has the
    dense and the pruned models side by side. `mix` is how the patterns of a mix were chosen. Values that were not
    measured are None. Keys unknown to this version are kept in `extra`.
    """

    format: Format
    version: str
    model: str
    note: str | None
    settings: dict[str, Plain | list[Plain]]
    versions: dict[str, str]
    layers: list[PrunedLayer]
    curve: list[RecordedRound]
    permutations: dict[str, list[Order]]
    gathers: list[Gather]
    dense: DenseWeights | None = None
    sample: Sample | None = None
    measured: Measured | None = None
    gap_closed: Value | None = None
    seconds: dict[str, Seconds | None] = dataclasses.field(default_factory=dict)
    peak_memory_mb: Value | None = None
    optimised: Optimised | None = None
    bench: Benchmark | None = None
    base_model: str | None = None
    license: str | None = None
    reordered: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    showcase: Showcase | None = None
    mix: Mix | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if "permute" in self.settings:  # the name in earlier versions
            self.settings["order"] = self.settings.pop("permute")
        self.settings.setdefault("update", "none")
        if wrong := [key for key in ("pattern", "order", "update") if not isinstance(self.settings.get(key), str)]:
            raise Malformed(f"settings.{wrong[0]} must be a text")
        for name, table in self.permutations.items():
            if not table or len(set(map(len, table))) > 1:
                raise Malformed(f"the blocks of {name} in permutations must be of one size")
        _check_unique("layers", [layer.name for layer in self.layers])
        _check_unique("gathers at the", [" of ".join(place) for gather in self.gathers for place in gather.places])

    def unpacked(self, stored: int) -> Record:
        """Return the record of the same model with its weights unpacked, which take so many bytes.

        A record without packed weights is returned as it is.
        """
        shown = self.showcase and self.showcase.resized(stored)
        values = dataclasses.replace(self, bench=None, showcase=shown).to_json()
        packed = values.pop(PACKED, {})
        return Record.of({**values, "gathers": packed["gathers"]}) if packed else self

    @classmethod
    def of(cls, values: object) -> Record:
        """Create a record from parsed JSON. Raises `Malformed` if it does not follow the schema."""
        record: Record = decode(cls, values)
        return record

    def to_json(self) -> dict[str, Any]:
        """The contents of the file as dicts and lists; infinities and NaN, written as null, are still numbers here."""
        values: dict[str, Any] = encode(self)
        return values


def read_record(folder: str | Path) -> Record:
    """Read and check the record in a folder. Raises `PermpruneError` if it is missing, damaged or of a newer format."""
    path = Path(folder) / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(number := values.get("format"), int) and number > FORMAT:
            number, version = map(reprlib.repr, (number, values.get("version")))
            raise PermpruneError(f"{path} is of format {number}, from permprune {version}: upgrade permprune")
        return Record.of(values)
    except FileNotFoundError as error:
        raise PermpruneError(f"{folder} holds no {RECORD}: give a folder that permprune wrote") from error
    except RecursionError as error:
        raise PermpruneError(f"{path} is damaged (it is nested too deeply): {ADVICE}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PermpruneError(f"{path} is damaged ({reason}): {ADVICE}") from error


def _check_metric(metric: str, values: list[float]) -> None:
    if metric == "perplexity" and any(value < 0.99 for value in values):
        raise Malformed("a perplexity is less than 1")


def _check_unique(what: str, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise Malformed(f"there are two {what} {twice[0]!r}")


@dataclasses.dataclass(frozen=True)
class Example:
    """An example of the evaluation data, and the answers to it, by the names of `SIDES`.

    `expected` is the right answer, None if there is none. `picture` is a thumbnail of an image, a JPEG file in base64,
    and `pictures` are those of answers that are images.
    """

    given: str
    answers: dict[str, str]
    expected: str | None = None
    picture: str | None = None
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SizeAndSpeed:
    """The size and the speed of one model.

    `bytes` are those of its tensors in the checkpoint. `packed` are those in 16 bits, where the weights of pruned
    layers are packed; None if they have no packed form. `speed` is how much it does in a second, in the data type
    `dtype`; None if it was not measured.
    """

    bytes: Bytes
    packed: Bytes | None = None
    speed: Rate | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Showcase:
    """What a run shows of the models of `SIDES`.

    `kind` is what the answers are, a `permprune.showcase.base.Kind`; `note` says how they came about or, without
    `examples`, why there are none. Speeds are in `unit`, on `threads` threads of the `device`, "CPU" or "GPU".
    """

    kind: str
    note: str
    examples: list[Example]
    sides: dict[str, SizeAndSpeed]
    unit: str = ""
    threads: Annotated[int, Range(1, MOST)] = 1
    device: str = ""

    def resized(self, stored: int) -> Showcase:
        """Return what remains true of the pruned model when it is written in another form, with so many bytes."""
        pruned = dataclasses.replace(self.sides["pruned"], bytes=stored, speed=None, dtype=None)
        return dataclasses.replace(self, sides={**self.sides, "pruned": pruned})


@dataclasses.dataclass(frozen=True)
class Point:
    """A choice of patterns: the share of the weights and the bytes that it keeps, and its loss on held-out data.

    `expected` is the loss according to the model at the chosen patterns, and `measured` the loss; both are before the
    search.
    """

    keep: Share
    bytes: Count
    expected: Value
    measured: Value


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A run of the search for the fewest weights within a loss: the share of the weights, and what was measured.

    `chosen` is the metric on the data for the choice, and `confirmed` that on the data for the result, which are looked
    at if the first is within the limit; else it is None. `error` is the standard error of what is lost there, as a
    share of the dense model's value.
    """

    keep: Share
    chosen: Value
    confirmed: Value | None = None
    error: Value | None = None


@dataclasses.dataclass(frozen=True)
class Mix:
    """The pattern of each layer, or `DENSE`, and what was found on the way.

    `keep` and `bytes` are the share of the weights and the bytes of the packed model that the choice keeps. `rounds`
    are the held-out losses of the choice, the last one that of the result, and `curve` has other choices, from few
    weights to all. `attempts` are those of a limit of the loss. `uniform` has the held-out loss of each candidate, by
    its name, if all layers have it. All these losses are before the search.
    """

    layers: dict[str, str]
    keep: Share
    bytes: Count
    rounds: list[Value]
    curve: list[Point]
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    uniform: dict[str, Value] = dataclasses.field(default_factory=dict)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the layers that do not stay dense."""
        return {name: Pattern.parse(text) for name, text in self.layers.items() if text != DENSE}

    @property
    def dense(self) -> list[str]:
        """The names of the layers that stay dense."""
        return [name for name, text in self.layers.items() if text == DENSE]
