"""Compare permuters on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from permprune.checkpoints.io import write_weights
from permprune.checkpoints.source import ModelSource
from permprune.config import PruneConfig
from permprune.data.overlap import warn_of_overlap
from permprune.evaluation.result import Metric, gap_closed
from permprune.evaluation.size import weight_bytes
from permprune.jobs.trials import Evaluation, Measurement, Trials
from permprune.models.processors import Processor
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuters
from permprune.pruning.folder import write_pruned
from permprune.system import distributed
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.out_of_memory import memory_reported

FIXED = ("pattern", "saliency", "mode", "update", "seed")
"""Fields of the config that a comparison's file names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow(Measurement):
    """A method of a comparison. `gap_closed` is its share of the gap between the dense model and no permutation."""

    gap_closed: float | None

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "gap_closed": self.gap_closed}


@dataclasses.dataclass(frozen=True, kw_only=True)
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

    @property
    def best(self) -> ComparisonRow:
        """The row of the method that measures best, no permutation among them; of equal ones the first."""
        sign = 1 if self.metric.higher_is_better else -1
        return max(self.rows[1:], key=lambda row: sign * row.result.value)

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
    out: str | Path | None = None,
    announce: Callable[[Comparison], None] = lambda result: None,
) -> Comparison:
    """Try permuters on the same calibration and saliency, one after the other.

    `model` is a name, a folder, or a model in memory with its `processor`, which has its dense weights again at the
    end. `methods` are names or objects, or either under labels; they take the place of the config's own. The dense
    model and no permutation are always among the rows. With `out` the model is pruned with the method that measures
    best, and written to that folder as `prune_to_folder` does; a model in memory stays pruned. `announce` is given the
    result before anything is written. Raises `PermpruneError`.
    """
    chosen = {**permuters(["none"]), **permuters(methods)}
    config, evaluation = config or PruneConfig(), evaluation or Evaluation()
    with (
        WorkFolder(Path(out)).held("compare", resume=False) if out else nullcontext() as work,
        Trials(model, config, evaluation=evaluation, processor=processor) as trials,
    ):
        if work:
            require_space(work.out, weight_bytes(trials.prepared.model, trials.stored))
        warn_of_overlap(trials.overlap)
        trials.prepared.dense.warn()
        measured = [trials.dense, *(trials.run(method, label).measurement for label, method in chosen.items())]
        metric = trials.dense.result.metric
        result = Comparison(
            model=trials.name,
            config=config,
            metric=metric,
            overlap=trials.overlap,
            calibrate_seconds=trials.prepared.seconds,
            rows=_rows(measured),
        )
        announce(result)
        if work:
            _write_best(trials, chosen[result.best.method], result, evaluation, work)
    return result


def _rows(measured: list[Measurement]) -> list[ComparisonRow]:
    """Measurements, of which the first is the dense model's and the second that of no permutation, with their gaps."""
    dense, none, metric = measured[0].result.value, measured[1].result.value, measured[0].result.metric
    return [
        ComparisonRow(**vars(found), gap_closed=gap_closed(found.result.value, dense, none, metric=metric))
        for found in measured
    ]


def _write_best(trials: Trials, method: Permuter, result: Comparison, evaluation: Evaluation, work: WorkFolder) -> None:
    """Prune with the best method, and write the folder."""
    pruned, (dense, none, *_), best = trials.prune(method), result.rows, result.best
    record = dataclasses.replace(
        pruned.record(),
        measured=evaluation.measured(dense.result, none.result, best.result, overlap=result.overlap),
        gap_closed=best.gap_closed,
        seconds={"calibrate": result.calibrate_seconds, "search": best.seconds},
        peak_memory_mb=best.peak_memory_mb,
    )

    def write() -> None:
        with atomic_folder(work.out, work.scratch) as folder:
            weights = partial(write_weights, pruned.model, trials.processor, trials.stored)
            write_pruned(record, pruned.probe, weights, folder)

    distributed.on_first(write)
