"""What a sweep measured, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from permprune.config import PruneConfig
from permprune.evaluation.result import Metric
from permprune.jobs.trials import Evaluation, Measurement
from permprune.permuters.base import CurvePoint

OWN = ("pattern", "permute", "minutes")
"""Fields of the config that cells have of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRow(Measurement):
    """A filled cell.

    `bytes` are those of the pruned model in theory, `size` their share of the dense one's, `layers` counts the layers
    of each pattern. `kept` and `error` are means over the layers (`LayerMeasure`), `curve` are the rounds of the
    search. `front` tells whether no other cell is as small and better, `score_front` the same of the tasks' score.
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
    score_front: bool | None = None

    def to_json(self) -> dict[str, Any]:
        score_front = {} if self.score_front is None else {"score_front": self.score_front}
        return {
            "pattern": self.pattern,
            **super().to_json(),
            "minutes": self.minutes,
            "stderr": self.result.stderr,
            "bytes": self.bytes,
            "layers": self.layers,
            "kept": self.kept,
            "error": self.error,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "gap_closed": self.gap_closed,
            "size": self.size,
            "front": self.front,
            **score_front,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRow(Measurement):
    """The dense model, its `bytes` in theory, and the share of the evaluation that is in the calibration as well."""

    bytes: float
    overlap: float

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "stderr": self.result.stderr, "bytes": self.bytes, "size": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep` measured, by `metric`: the `dense` model, and a row for each cell. `note` is the zoo model's."""

    model: str
    note: str | None
    config: PruneConfig
    evaluation: Evaluation
    dense: DenseRow
    rows: list[SweepRow]

    @property
    def metric(self) -> Metric:
        return self.dense.result.metric

    def to_json(self) -> dict[str, Any]:
        """The contents of figures.json."""
        result, given = self.dense.result, self.config.to_json()
        return {
            "model": self.model,
            "note": self.note,
            "settings": {name: value for name, value in given.items() if name not in OWN},
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
    """Of (bytes, value of the metric): whether no other point is as small and better, or smaller and as good."""
    sign = -1 if metric.higher_is_better else 1
    costs = [(size, sign * value) for size, value in points]
    return [
        math.isfinite(own[1]) and not any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in costs)
        for own in costs
    ]
