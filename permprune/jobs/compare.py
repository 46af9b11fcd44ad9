"""Compare permuters on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from permprune.checkpoints.source import ModelSource
from permprune.config import PruneConfig
from permprune.data.overlap import warn_of_overlap
from permprune.evaluation.result import Metric, gap_closed
from permprune.jobs.trials import Evaluation, Measurement, Trials
from permprune.models.processors import Processor
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuters
from permprune.system.out_of_memory import memory_reported

FIXED = ("pattern", "saliency", "mode", "update", "seed")
"""Fields of the config that a comparison's file names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow(Measurement):
    """A method of a comparison. `gap_closed` is its share of the gap between the dense model and no permutation."""

    gap_closed: float | None

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "gap_closed": self.gap_closed}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` measured, by `metric`: a row for the dense model, for no permutation, and for each method.

    `overlap` is the share of the evaluation that is in the calibration as well.
    """

    model: str
    config: PruneConfig
    metric: Metric
    overlap: float
    calibrate_seconds: float
    rows: list[ComparisonRow]

    def to_json(self) -> dict[str, Any]:
        """The contents of a file of figures."""
        config = self.config.to_json()
        return {
            "model": self.model,
            **{name: config[name] for name in FIXED},
            "calibrate_seconds": self.calibrate_seconds,
            "metric": self.metric.name,
            "overlap": self.overlap,
            "rows": [row.to_json() for row in self.rows],
        }


@memory_reported()
def compare(
    model: ModelSource,
    methods: Sequence[str | Permuter] | Mapping[str, str | Permuter],
    config: PruneConfig | None = None,
    *,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
) -> Comparison:
    """Try permuters on the same calibration and saliency, one after the other.

    `model` is a name, a folder, or a model in memory with its `processor`, which has its dense weights again at the
    end. `methods` are names or objects, or either under labels; they take the place of the config's own. The dense
    model and no permutation are always among the rows. Raises `PermpruneError`.
    """
    chosen = {**permuters(["none"]), **permuters(methods)}
    config = config or PruneConfig()
    with Trials(model, config, evaluation=evaluation or Evaluation(), processor=processor) as trials:
        warn_of_overlap(trials.overlap)
        trials.prepared.dense.warn()
        dense = trials.dense
        measured = [dense, *(trials.run(method, label).measurement for label, method in chosen.items())]
        metric, none = dense.result.metric, measured[1].result.value
        rows = [
            ComparisonRow(
                **vars(found), gap_closed=gap_closed(found.result.value, dense.result.value, none, metric=metric)
            )
            for found in measured
        ]
        return Comparison(trials.name, config, metric, trials.overlap, trials.prepared.seconds, rows)
