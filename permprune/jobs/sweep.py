"""Patterns x methods x budgets on one model: what each cell costs and what it is worth."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from permprune.checkpoints.offload import read_skeleton
from permprune.config import PruneConfig
from permprune.data.overlap import warn_of_overlap
from permprune.errors import PermpruneError
from permprune.evaluation.result import gap_closed, higher_is_better
from permprune.evaluation.size import model_bytes
from permprune.jobs.trials import Evaluation, Trials
from permprune.models.layers import block_linears, dense_weights, prunable_layers
from permprune.options import Count, Positive, require
from permprune.pattern import parse_pattern
from permprune.permuters.base import LocalPermuter
from permprune.permuters.registry import permuter
from permprune.report.sweep import write_sweep
from permprune.report.tradeoff import SCORE
from permprune.system import distributed
from permprune.system.digests import CALIBRATION, CONFIG, WEIGHTS, versions
from permprune.system.files import WorkFolder, atomic_folder, read_sealed, require_space, write_json, write_sealed
from permprune.system.memory import keep_freed_memory
from permprune.system.out_of_memory import memory_reported
from permprune.system.progress import console, log, track
from permprune.system.search_state import Checkpoint, require_same
from permprune.zoo.models import note

Row = dict[str, Any]

IDENTITY = "sweep.json"
"""What the cells in a work folder were asked for, and digests of the model and the data that they were measured on."""

DENSE = "dense.json"
"""What the dense model scores."""

CELLS = "cells"
"""The subfolder of their rows."""

AGAIN, ANEW = "remove it, and --resume measures it again", "remove its folder and start anew"

FREE = ("pattern", "permute", "minutes", "batch", "recompute")
"""Fields of the config that cells have of their own, or that may change before an interrupted sweep goes on."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pattern with one method; `minutes` bounds its search, which else ends by itself."""

    pattern: str
    method: str
    minutes: float | None = None

    @property
    def name(self) -> str:
        """What its files are called."""
        budget = "" if self.minutes is None else f" {self.minutes:g}"
        return f"{self.pattern} {self.method}{budget}".replace(":", "-")


@dataclasses.dataclass(frozen=True)
class Job:
    """The cells of one pattern that are to be filled, on one calibrated model, and the folder for what they give.

    `asked` is what the whole sweep depends on.
    """

    model: str
    config: PruneConfig
    evaluation: Evaluation
    cells: tuple[Cell, ...]
    folder: Path
    asked: dict[str, Any]


@memory_reported()
def sweep(
    name: str,
    out: Path,
    patterns: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[float],
    config: PruneConfig,
    evaluation: Evaluation,
    jobs: int = 1,
    resume: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Fill every cell, and write figures.json, report.html and pareto.png to the folder `out`.

    A cell is measured as `compare` does; no permutation is always among the methods. `budgets` are minutes, none to let
    searches end by themselves; methods that work layer by layer have no use for them, and a search goes on from where
    a smaller budget left it. While it runs, `out`.partial keeps the row of every finished cell and the states of the
    searches, from which `resume` goes on; more patterns, methods and budgets may be asked for then. `jobs` processes
    take a pattern each at a time; under `torchrun` all processes share each cell's work instead. `announce` is
    given the figures before they are written. Returns them. Raises `PermpruneError`.
    """
    cells = plan_cells(patterns, methods, budgets)
    asked = _asked(name, config, evaluation)
    with WorkFolder(out).held("sweep", resume) as work:
        _check(name, cells, config, jobs)
        distributed.on_first(lambda: _require_sound(work.path, cells, asked))
        missing = [cell for cell in cells if not _path(work.path, cell).exists()]
        distributed.wait()  # until all have looked
        groups = _by_pattern(missing) or [cells[:1]]  # one at least, which compares the data with that of the cells
        own = dataclasses.replace(config, minutes=None)
        _fill([Job(name, own, evaluation, tuple(group), work.path, asked) for group in groups], jobs)
        result = _figures(name, config, evaluation, cells, work.path)
        announce(result)
        distributed.on_first(lambda: _write(result, work))
    return result


def _write(result: dict[str, Any], work: WorkFolder) -> None:
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        write_json(folder / "figures.json", result)
        write_sweep(result, folder)


def plan_cells(patterns: Sequence[str], methods: Sequence[str], budgets: Sequence[float]) -> list[Cell]:
    """The cells by pattern, method and rising budget. Raises `PermpruneError` for names and budgets that are none."""
    if not patterns:
        raise PermpruneError("a sweep takes one pattern at least")
    for budget in budgets:
        require("budgets", budget, Positive)
    cells = []
    for pattern in dict.fromkeys(patterns):
        parse_pattern(pattern)
        for method in dict.fromkeys(["none", *methods]):
            local = isinstance(permuter(method), LocalPermuter)
            limits: Sequence[float | None] = [None] if local or not budgets else sorted(set(budgets))
            cells += [Cell(pattern, method, minutes) for minutes in limits]
    return cells


def _check(name: str, cells: list[Cell], config: PruneConfig, jobs: int) -> None:
    """Refuse at once what would fail after hours."""
    require("jobs", jobs, Count)
    if jobs > 1 and distributed.world() > 1:
        raise PermpruneError(f"{jobs} jobs in {distributed.world()} processes: give --jobs without torchrun")
    skeleton = read_skeleton(name, trust_remote_code=config.trust_remote_code)
    for pattern in dict.fromkeys(cell.pattern for cell in cells):
        prunable_layers(skeleton, parse_pattern(pattern), config.exclude)
    dense_weights(skeleton, [layer.name for layer in block_linears(skeleton)]).warn()  # not of those left out by choice


def _asked(name: str, config: PruneConfig, evaluation: Evaluation) -> dict[str, Any]:
    fixed = {key: value for key, value in config.identity().items() if key not in FREE}
    asked = {"model": name, **fixed, **{f"data {k}": v for k, v in dataclasses.asdict(evaluation).items()}}
    return json.loads(json.dumps(asked))  # type: ignore[no-any-return] # tuples as lists


def _require_sound(partial: Path, cells: list[Cell], asked: dict[str, Any]) -> None:
    """Raise `PermpruneError` for the work folder of another sweep, and for files in it that have been damaged."""
    if (path := partial / IDENTITY).exists():
        require_same(path, read_sealed(path, ANEW)["asked"], asked)
    elif (partial / CELLS).exists():
        raise PermpruneError(f"{path} is missing: {ANEW}")
    for path in (partial / DENSE, *(_path(partial, cell) for cell in cells)):
        if path.exists():
            read_sealed(path, AGAIN)


def _agree(path: Path, asked: dict[str, Any], data: dict[str, Any]) -> None:
    """Write what the cells beside `path` depend on, or raise `PermpruneError` if they were measured on other data."""
    if path.exists():
        require_same(path, read_sealed(path, ANEW)["data"], data)
    else:
        write_sealed(path, {"asked": asked, "data": data})


def _path(partial: Path, cell: Cell) -> Path:
    return partial / CELLS / f"{cell.name}.json"


def _by_pattern(cells: list[Cell]) -> list[list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.pattern, []).append(cell)
    return list(found.values())


def _fill(work: list[Job], jobs: int) -> None:
    if jobs == 1 or len(work) < 2:
        for job in work:
            fill(job)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (threads, log.level))
    try:
        for future in track(as_completed([pool.submit(fill, job) for job in work]), "patterns", len(work)):
            future.result()
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise PermpruneError(
                "a process of the sweep died, perhaps for want of memory: go on with --resume and fewer --jobs"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int, level: int) -> None:
    """Work in silence, and end when the parent does, even where it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(threads)
    keep_freed_memory()
    console.quiet = True
    log.handlers[:] = [logging.StreamHandler()]
    log.setLevel(level)


def fill(job: Job) -> None:
    """Measure the cells of a job in turn; each row is written as soon as it is there."""
    trials = Trials(job.model, dataclasses.replace(job.config, pattern=job.cells[0].pattern), job.evaluation)
    prepared = trials.prepared
    sizes = Counter(map(str, prepared.network.patterns.values()))
    states = [permuter(cell.method).state_bytes(prepared.network) for cell in job.cells]
    require_space(job.folder, sum(states))
    distributed.on_first(lambda: _agree(job.folder / IDENTITY, job.asked, _data(trials)))
    _measure_dense(trials, job.folder / DENSE)
    for cell in job.cells:
        if _path(job.folder, cell).exists():
            continue
        method = permuter(cell.method)
        checkpoint = Checkpoint(_states(job, cell), prepared.run.checkpoint.settings)
        trial = trials.run(method, dataclasses.replace(prepared.run, minutes=cell.minutes, checkpoint=checkpoint))
        layers = prepared.network.measures()
        row = {
            "pattern": cell.pattern,
            **trial.row(cell.method),
            "minutes": cell.minutes,
            "stderr": trial.result.stderr,
            "bytes": model_bytes(prepared.model, prepared.layers, prepared.network.patterns),
            "layers": dict(sorted(sizes.items())),
            "kept": math.fsum(layer.kept for layer in layers) / len(layers),
            "error": math.fsum(layer.error for layer in layers) / len(layers),
            "curve": [dataclasses.asdict(point) for point in trial.solution.curve],
        }
        if not distributed.rank():
            write_sealed(_path(job.folder, cell), row)


def _data(trials: Trials) -> dict[str, Any]:
    run, evaluation = trials.prepared.run, trials.measure.examples.digest
    return {name: run.checkpoint.settings[name] for name in (CONFIG, WEIGHTS, *versions())} | {
        CALIBRATION: [trials.prepared.measured.digest, run.train.digest, run.held_out.digest],
        "evaluation examples": evaluation,
    }


def _measure_dense(trials: Trials, path: Path) -> None:
    """Write what the dense model scores, unless another job did."""
    known = path.exists()
    distributed.wait()  # until all have looked
    if known:
        return
    warn_of_overlap(trials.overlap)
    dense = trials.dense
    size = model_bytes(trials.prepared.model, [], {})
    row = {**dense.row("dense"), "stderr": dense.result.stderr, "bytes": size}
    result = dense.result
    measured = {"metric": result.metric, "count": result.count, "unit": result.unit, "overlap": trials.overlap}
    if not distributed.rank():
        write_sealed(path, {"row": row, "measured": measured})


def _states(job: Job, cell: Cell) -> Path:
    """The folder of a cell's states, which begins where the search of the next smaller budget ended."""
    own = job.folder / "states" / cell.name
    smaller = [
        other
        for other in (job.folder / "states").glob(f"{dataclasses.replace(cell, minutes=None).name} *")
        if other.is_dir() and (cell.minutes is None or _minutes(other) < cell.minutes)
    ]
    if smaller and not own.exists() and not distributed.rank():
        with atomic_folder(own) as copied:
            shutil.copytree(max(smaller, key=_minutes), copied, dirs_exist_ok=True)
    distributed.wait()
    return own


def _minutes(states: Path) -> float:
    return float(states.name.rpartition(" ")[2])


def _figures(
    name: str, config: PruneConfig, evaluation: Evaluation, cells: list[Cell], partial: Path
) -> dict[str, Any]:
    """What every cell gave, beside the dense model, in the order of the cells."""
    dense = read_sealed(partial / DENSE, AGAIN)
    measured = dense["measured"]
    metric = measured["metric"]
    rows = [read_sealed(_path(partial, cell), AGAIN) for cell in cells]
    for row in rows:
        row[metric] = math.inf if row[metric] is None else row[metric]
    none = {row["pattern"]: row[metric] for row in rows if row["method"] == "none"}
    for row in rows:
        row["gap_closed"] = gap_closed(row[metric], dense["row"][metric], none[row["pattern"]], metric)
        row["size"] = row["bytes"] / dense["row"]["bytes"]
    _mark_front(rows, metric, "front")
    if SCORE in dense["row"]:
        _mark_front(rows, SCORE, "score_front")
    fixed = {key: value for key, value in config.to_json().items() if key not in ("pattern", "permute", "minutes")}
    return {
        "model": name,
        "note": note(name),
        "settings": fixed,
        "measured": {"data": evaluation.source or "default data", **measured},
        "metric": metric,
        "dense": {**dense["row"], "size": 1.0},
        "rows": rows,
    }


def _mark_front(rows: list[Row], value: str, mark: str) -> None:
    for row, best in zip(rows, pareto([(row["bytes"], row[value]) for row in rows], value), strict=True):
        row[mark] = best


def pareto(points: Sequence[tuple[float, float]], metric: str) -> list[bool]:
    """Of (bytes, value of the metric): whether no other point is as small and better, or smaller and as good."""
    sign = -1 if higher_is_better(metric) else 1
    costs = [(size, sign * value) for size, value in points]
    return [
        math.isfinite(own[1]) and not any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in costs)
        for own in costs
    ]
