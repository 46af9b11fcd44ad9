"""The jobs of the command line, from model name to files: prune, compare, verify."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from permprune import parallel
from permprune.data import TOGETHER, kind_of, load_examples, warn_of_overlap
from permprune.evaluate import Result, evaluate_model, fit_probe, perplexity, with_head
from permprune.examples import Examples
from permprune.footprint import weight_bytes
from permprune.model_io import load, read_model, write_weights
from permprune.offload import read_offloaded, write_offloaded
from permprune.options import Count, require
from permprune.permuters import LocalPermuter, Permuter, permuter
from permprune.pipeline import (
    Plan,
    Pruned,
    Settings,
    calibration_examples,
    finish,
    gap_closed,
    plan_run,
    prepare,
    update_weights,
)
from permprune.pruning.folder import require_probe, write_model, write_pruned
from permprune.pruning.origin import origin_of
from permprune.pruning.patterns import recorded_patterns, require_patterns
from permprune.pruning.probe import check_outputs
from permprune.pruning.record import Measured, Record
from permprune.resources import keep_freed_memory, peak_memory_mb, reset_peak_memory
from permprune.streaming import DECIDED, NATURAL, Stream, exceeds_memory
from permprune.system.files import (
    WorkFolder,
    atomic_folder,
    require_absent,
    require_space,
    require_writable,
)
from permprune.trials import ANSWERED_ONCE, BATCH, Evaluation, Meter, Trials, transcriber


def evaluate(name: str, evaluation: Evaluation, *, trust_remote_code: bool = False) -> Result:
    """What a model, by name or folder, scores: perplexity, accuracy or word error rate.

    `trust_remote_code` is as that of `read_model`. Raises `PermpruneError` for examples that do not say what is right.
    """
    keep_freed_memory()
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    examples, tokenizer = evaluation.examples(model, processor), transcriber(model, processor)
    return evaluate_model(model, examples, tokenizer, None, BATCH * TOGETHER[kind_of(model)], evaluation.metric)[0]


def probe(
    name: str,
    out: Path,
    classes: Sequence[str],
    source: str | None,
    windows: int,
    *,
    trust_remote_code: bool = False,
) -> Result:
    """Fit a linear classifier of these classes to what a model makes of images or sentences, and write both to `out`.

    A pruned model keeps its record and its gathers. `source` and `windows` are as those of `Evaluation`, of the part to
    train on; `trust_remote_code` as that of `read_model`. Returns the accuracy on a held-out part of it. Raises
    `PermpruneError`.
    """
    require("windows", windows, Count)
    require_absent(out)
    require_writable(out)
    keep_freed_memory()
    model, processor, _ = read_model(name, trust_remote_code=trust_remote_code)
    require_space(out, weight_bytes(model))
    headed = with_head(model, classes)
    if (origin := origin_of(headed)).record:
        require_probe(origin)
    fitted = fit_probe(headed, load_examples(source, headed, processor, "probe", windows * ANSWERED_ONCE))
    unmeasured = {"measured": None, "gap_closed": None, "optimised": None}  # that was with another head
    with atomic_folder(out) as folder:
        write_model(fitted.model, processor, folder, **unmeasured)
    return fitted.result


def prune_to_folder(
    name: str,
    out: Path,
    permute: str,
    settings: Settings,
    evaluation: Evaluation,
    resume: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Permute, prune, update, fold, measure, and write the checkpoint, its record and its report to `out`.

    While it runs everything lies in `out`.partial, the searches' states included; `out` appears when all is there.
    With `resume` a search goes on from its last state. `announce` is given the record before anything is written to
    `out`. Returns the record. Raises `PermpruneError`.
    """
    method = permuter(permute)
    with WorkFolder(out).held("prune", resume) as work:
        reset_peak_memory()
        started = time.monotonic()
        prune_model = _prune_streamed if exceeds_memory(name, method, settings) else _prune_held
        done = prune_model(name, permute, settings, evaluation, work)
        measured = done.measured
        record = dataclasses.replace(
            done.pruned.record(),
            measured=measured,
            gap_closed=gap_closed(measured.pruned, measured.dense, measured.none, measured.metric),
            seconds={**done.seconds, "total": time.monotonic() - started},
            peak_memory_mb=peak_memory_mb(),
        )
        announce(record.to_json())
        parallel.on_first(lambda: _write(done, record, work))
    return record.to_json()


def compare(
    name: str, methods: Sequence[str] | Mapping[str, Permuter], settings: Settings, evaluation: Evaluation
) -> dict[str, Any]:
    """One row a method, by name or under a label, on the same calibration and saliency.

    The dense model and no permutation are always among them.

    "seconds" are those of the search, its start included; "peak_memory_mb" that of the process while it ran. "overlap"
    is the share of the evaluation that is in the calibration as well.
    """
    named = methods if isinstance(methods, Mapping) else {method: permuter(method) for method in methods}
    chosen = {"none": permuter("none"), **named}
    trials = Trials(name, settings, evaluation)
    warn_of_overlap(trials.overlap)
    dense = trials.dense.result
    rows = [trials.dense.row("dense"), *(trials.run(method).row(label) for label, method in chosen.items())]
    none = rows[1][dense.metric]
    for row in rows:
        row["gap_closed"] = gap_closed(row[dense.metric], dense.value, none, dense.metric)
    fixed = {key: getattr(settings, key) for key in ("pattern", "saliency", "mode", "update", "seed")}
    return {
        "model": name,
        **fixed,
        "calibrate_seconds": trials.prepared.seconds,
        "metric": dense.metric,
        "overlap": trials.overlap,
        "rows": rows,
    }


def verify_folder(folder: Path, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Prove a folder that permprune wrote: N:M in stored order, it reloads, and it says what the masked model said.

    Returns "layers", how many were checked, and "difference", the largest of the outputs. `trust_remote_code` is as
    that of `read_model`. Raises `PermpruneError` naming the first thing that does not hold.
    """
    model = load(folder, trust_remote_code=trust_remote_code)
    origin = origin_of(model)
    assert origin.record is not None
    patterns = recorded_patterns(model, origin.record.layers)
    require_patterns(model, patterns)
    return {"layers": len(patterns), "difference": check_outputs(model, require_probe(origin), str(folder))}


@dataclasses.dataclass
class _Done:
    """A pruned model, what was measured of it, and how to write its weights and processor to a folder."""

    pruned: Pruned
    measured: Measured
    seconds: dict[str, float]
    write: Callable[[Path], None]


def _prune_held(name: str, permute: str, settings: Settings, evaluation: Evaluation, work: WorkFolder) -> _Done:
    """Prune a model that is held in memory."""
    method = permuter(permute)
    model, processor, stored = read_model(name, trust_remote_code=settings.trust_remote_code)
    require_space(work.out, weight_bytes(model, stored))
    prepared = prepare(model, processor, settings, partial=work.path)
    require_space(work.out, weight_bytes(model, stored) + method.state_bytes(prepared.network))
    with prepared.network.dense_weights():
        measure = Meter(model, processor, evaluation)
        dense = measure()
    overlap = _said_overlap(prepared, measure.examples)
    update_weights(prepared)
    natural, none = prepared.network.measures(), measure()
    solution = method.solve(prepared.network, prepared.run)
    searched = time.monotonic()
    update_weights(prepared)
    seconds = {"calibrate": prepared.seconds, "search": solution.seconds, "update": time.monotonic() - searched}
    pruned = finish(prepared, solution, natural, permute)
    measured = _measured(evaluation, overlap, dense, none, measure())
    return _Done(pruned, measured, seconds, lambda folder: write_weights(model, processor, stored, folder))


def _prune_streamed(name: str, permute: str, settings: Settings, evaluation: Evaluation, work: WorkFolder) -> _Done:
    """Prune a model that is read layer by layer, by a method and settings that `exceeds_memory` let pass."""
    started = time.monotonic()
    rank, trust = f"rank-{parallel.rank()}", settings.trust_remote_code
    model, processor, stored, weights = read_offloaded(name, work.scratch / rank, trust_remote_code=trust)
    require_space(work.out, weight_bytes(model, stored))
    examples = evaluation.examples(model, processor)
    plan = plan_run(model, settings, calibration_examples(model, processor, settings), weights.stored)
    overlap = _said_overlap(plan, examples)
    stream = Stream(model, weights, plan, work.path / rank)
    require_space(work.out, weight_bytes(model, stored) + parallel.world() * stream.state_bytes)
    pruned = stream.solve(cast(LocalPermuter, permuter(permute)), permute)
    calibrated = time.monotonic() - started - stream.seconds
    seconds = {"calibrate": calibrated, "search": pruned.solution.seconds, "update": 0.0}
    results = []
    for edit in (None, stream.masked(NATURAL), stream.masked(DECIDED)):
        weights.edit = edit
        results.append(perplexity(model, examples))
    weights.edit = stream.stored(pruned)

    def write(folder: Path) -> None:
        write_offloaded(model, processor, weights, stored, bool(pruned.gathers), folder, cast(int, settings.memory))

    return _Done(pruned, _measured(evaluation, overlap, *results), seconds, write)


def _said_overlap(plan: Plan, examples: Examples) -> float:
    """The share of an evaluation that is in the calibration as well, with a warning where it is large."""
    share = plan.overlap(examples)
    warn_of_overlap(share)
    return share


def _measured(evaluation: Evaluation, overlap: float, dense: Result, none: Result, pruned: Result) -> Measured:
    values = {"dense": dense.value, "none": none.value, "pruned": pruned.value}
    source = evaluation.source or "default data"
    return Measured(data=source, metric=dense.metric, **values, count=dense.count, unit=dense.unit, overlap=overlap)


def _write(done: _Done, record: Record, work: WorkFolder) -> None:
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        write_pruned(record, done.pruned.probe, done.write, folder)
