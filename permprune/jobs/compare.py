"""The job of `permprune compare`: compare permuters on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from permprune.checkpoints.record import Showcase
from permprune.checkpoints.source import ModelSource, name_of
from permprune.config import PruneConfig
from permprune.engine.held import Held
from permprune.engine.measuring import Evaluation, Measurement
from permprune.engine.session import Session
from permprune.engine.stages import stages_of_attempts
from permprune.evaluation.result import Metric, gap_closed
from permprune.evaluation.size import weight_bytes
from permprune.jobs.prune import write_pruned_weights
from permprune.jobs.speeds import add_speeds
from permprune.models.processors import Processor
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuters
from permprune.system import distributed
from permprune.system.failures import failures_reported
from permprune.system.files import WorkFolder, require_space
from permprune.system.progress import SPEED, WRITE, stage, stages

FIXED = ("pattern", "saliency", "mode", "update", "train", "seed")
"""Fields of the config that the JSON file of a comparison contains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow(Measurement):
    """The measurement of one method.

    `gap_closed` is the share that the method closes of the gap between no permutation and the dense model.
    """

    gap_closed: float | None

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "gap_closed": self.gap_closed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare`: a row for the dense model, one for no permutation, and one for each method.

    All rows are measured by `metric`. `overlap` is the share of the evaluation data that the calibration data contain.
    `showcase` has the dense model, no permutation and the best method side by side.
    """

    model: str
    config: PruneConfig
    metric: Metric
    overlap: float
    calibrate_seconds: float
    rows: list[ComparisonRow]
    showcase: Showcase

    @property
    def best(self) -> ComparisonRow:
        """The row of the best method, which may be no permutation; the first row if several are equally good."""
        return _best(self.rows[1:])

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        config = self.config.to_json()
        return {
            "model": self.model,
            **{name: config[name] for name in FIXED},
            "calibrate_seconds": self.calibrate_seconds,
            "metric": self.metric.name,
            "overlap": self.overlap,
            "rows": [row.to_json() for row in self.rows],
            "showcase": dataclasses.asdict(self.showcase),
        }


@failures_reported()
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
    """Compare permuters on one model, with the same calibration data and saliency.

    `model` is a name, a folder, or a model in memory with its `processor`. The dense weights of a model in memory are
    restored at the end. `methods` are names or objects, or a mapping of labels to these; they replace the config's
    `permute`. The dense model and no permutation are always measured as well. With `out`, the model is pruned with the
    best method and written to that folder as by `prune_to_folder`; a model in memory then stays pruned. `announce` is
    called with the result before anything is written. Raises `PermpruneError`.
    """
    chosen = {**permuters(["none"]), **permuters(methods)}
    config, evaluation = (config or PruneConfig()).completed(), evaluation or Evaluation()
    config.require_no_limit("compare")
    names = stages_of_attempts(chosen.values(), config)
    with stages(*names, *([WRITE, SPEED] if out else [])):
        with (
            WorkFolder(Path(out)).held("compare", resume=False) if out else nullcontext() as work,
            Session(partial(Held.open, model, config, processor), evaluation) as session,
        ):
            weights = session.weights
            if work:
                require_space(work.out, weight_bytes(weights.model, weights.stored))
            overlap, dense = session.overlap, session.dense
            weights.plan.dense.warn()
            tried = {label: session.attempt(method, label)[1] for label, method in chosen.items()}
            none, metric = tried["none"].result.value, dense.result.metric
            closed = partial(gap_closed, dense=dense.result.value, none=none, metric=metric)
            rows = [ComparisonRow(**vars(row), gap_closed=closed(row.result.value)) for row in (dense, *tried.values())]
            result = Comparison(
                model=name_of(weights.model),
                config=config,
                metric=metric,
                overlap=overlap,
                calibrate_seconds=weights.seconds,
                rows=rows,
                showcase=session.beside(tried["none"], _best(rows[1:])),
            )
            announce(result)
            if work:
                method = chosen[result.best.method]
                measured = {"none": tried["none"], method.name: tried[result.best.method]}
                weights.plan = dataclasses.replace(weights.plan, config=weights.plan.config.replace(permute=method))
                pruned, record = session.prune(method, tried=measured)
                distributed.on_first(partial(write_pruned_weights, weights, pruned, record, work))
        if out and not isinstance(model, PreTrainedModel) and distributed.rank() == 0:
            stage(SPEED)
            add_speeds(Path(out), str(model), config)
    return result


def _best(rows: Sequence[ComparisonRow]) -> ComparisonRow:
    return min(rows, key=lambda row: row.result.metric.cost(row.result.value))
