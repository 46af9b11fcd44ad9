"""Compare permuters on one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from permprune.config import PruneConfig
from permprune.data.overlap import warn_of_overlap
from permprune.evaluation.result import gap_closed
from permprune.jobs.trials import Evaluation, Trials
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuter
from permprune.system.out_of_memory import memory_reported


@memory_reported()
def compare(
    name: str, methods: Sequence[str] | Mapping[str, Permuter], config: PruneConfig, evaluation: Evaluation
) -> dict[str, Any]:
    """One row a method, by name or under a label, on the same calibration and saliency.

    The dense model and no permutation are always among them.

    "seconds" are those of the search, its start included; "peak_memory_mb" that of the process while it ran. "overlap"
    is the share of the evaluation that is in the calibration as well.
    """
    named = methods if isinstance(methods, Mapping) else {method: permuter(method) for method in methods}
    chosen = {"none": permuter("none"), **named}
    trials = Trials(name, config, evaluation)
    warn_of_overlap(trials.overlap)
    trials.prepared.dense.warn()
    dense = trials.dense.result
    rows = [trials.dense.row("dense"), *(trials.run(method).row(label) for label, method in chosen.items())]
    none = rows[1][dense.metric]
    for row in rows:
        row["gap_closed"] = gap_closed(row[dense.metric], dense.value, none, dense.metric)
    fixed = {key: config.to_json()[key] for key in ("pattern", "saliency", "mode", "update", "seed")}
    return {
        "model": name,
        **fixed,
        "calibrate_seconds": trials.prepared.seconds,
        "metric": dense.metric,
        "overlap": trials.overlap,
        "rows": rows,
    }
