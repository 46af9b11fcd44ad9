"""The cells of a comparison and their results, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from permprune.checkpoints.schema import encode
from permprune.config import PruneConfig
from permprune.engine.measuring import Evaluation, Measurement
from permprune.errors import PermpruneError
from permprune.evaluation.result import Metric
from permprune.options import Positive, require
from permprune.pattern import MIXED, Pattern
from permprune.permuters.base import CurvePoint, LocalPermuter, Permuter

CELL_FIELDS = ("pattern", "keep", "order", "minutes")
"""Fields of the config that differ between cells."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of a pattern, a method by its label, and a time limit of the search in `minutes` (or None).

    The pattern of a mix may have the share of the weights that it keeps: "mixed@0.6".
    """

    pattern: str
    method: str
    minutes: float | None = None

    @property
    def name(self) -> str:
        """The name of the cell's files, without an extension."""
        budget = "" if self.minutes is None else f" {self.minutes:g}"
        return quote(f"{self.pattern} {self.method}{budget}", safe=" =@,")


def of_pattern(config: PruneConfig, pattern: str) -> PruneConfig:
    """Return the config of the cells of a pattern. Raises `PermpruneError` for an unknown pattern."""
    name, at, share = pattern.partition("@")
    if name != MIXED or not at:
        return config.replace(pattern=pattern)
    try:
        return config.replace(pattern=name, keep=float(share))
    except ValueError:
        raise PermpruneError(f'"{pattern}" keeps no share of the weights: give one, as {MIXED}@0.6') from None


def plan_cells(
    patterns: Sequence[str | Pattern], methods: Mapping[str, Permuter], budgets: Sequence[float]
) -> list[Cell]:
    """Return the cells, ordered by pattern, method and increasing budget; methods that work layer by layer have none.

    Raises `PermpruneError` for an unknown pattern and for a budget that is not positive.
    """
    for budget in budgets:
        require("budgets", budget, Positive)
    cells = []
    for pattern in dict.fromkeys(map(str, patterns)):
        of_pattern(PruneConfig(), pattern)
        for label, method in methods.items():
            limited = budgets and not isinstance(method, LocalPermuter)
            limits: Sequence[float | None] = sorted(set(budgets)) if limited else [None]
            cells += [Cell(pattern, label, minutes) for minutes in limits]
    return cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow(Measurement):
    """The measurement of one cell.

    `bytes` is the theoretical size of the pruned model and `size` its ratio to the dense model's. `layers` is the
    number of layers by pattern. `kept` and `error` are means over the layers (`LayerMeasure`), and `curve` has the
    rounds of the search. `gap_closed` is the share that the method closes of the gap between no permutation and the
    dense model. `front` is whether the cell is on the Pareto front of size and metric (see `pareto`).
    """

    pattern: str
    minutes: float | None
    bytes: float
    layers: dict[str, int]
    kept: float
    error: float
    curve: list[CurvePoint]
    size: float = math.nan
    gap_closed: float | None = None
    front: bool = False

    def to_json(self) -> dict[str, Any]:
        names = ("bytes", "layers", "kept", "error", "curve", "gap_closed", "size", "front")
        values = {"pattern": self.pattern, **super().to_json(), "minutes": self.minutes, "stderr": self.result.stderr}
        return values | {name: encode(getattr(self, name)) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRow(Measurement):
    """The measurement of the dense model.

    `bytes` is its theoretical size; `overlap` is the share of the evaluation data that the calibration data contain.
    """

    bytes: float
    overlap: float

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "stderr": self.result.stderr, "bytes": self.bytes, "size": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare`: the measurement of the `dense` model and a row for each cell, all by `metric`.

    `note` is the note of a model from the zoo, None for other models.
    """

    model: str
    note: str | None
    config: PruneConfig
    evaluation: Evaluation
    dense: DenseRow
    rows: list[ComparisonRow]

    @property
    def metric(self) -> Metric:
        """The metric of all rows."""
        return self.dense.result.metric

    @property
    def best(self) -> ComparisonRow:
        """The row with the best value; the first one if several are equally good."""
        return min(self.rows, key=lambda row: self.metric.cost(row.result.value))

    def to_json(self) -> dict[str, Any]:
        """Return the contents of figures.json."""
        result, settings = self.dense.result, self.config.to_json()
        return {
            "model": self.model,
            "note": self.note,
            "settings": {name: value for name, value in settings.items() if name not in CELL_FIELDS},
            "measured": {
                "data": self.evaluation.source or "default data",
                "metric": self.metric.name,
                "count": result.count,
                "unit": result.unit,
                "overlap": self.dense.overlap,
            },
            "metric": self.metric.name,
            "dense": self.dense.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }


def pareto(points: Sequence[tuple[float, float]], metric: Metric) -> list[bool]:
    """Return, for each point (bytes, value of the metric), whether it is on the Pareto front.

    A point is on the front if its value is finite and no other point is at least as small and at least as good.
    """
    costs = [(size, metric.cost(value)) for size, value in points]
    return [
        math.isfinite(loss) and not any(a <= size and b <= loss and (a, b) != (size, loss) for a, b in costs)
        for size, loss in costs
    ]
