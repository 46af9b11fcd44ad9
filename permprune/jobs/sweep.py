"""The job of `permprune sweep`: measure every combination of pattern, method and time budget on one model."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from permprune.checkpoints.offload import read_skeleton
from permprune.checkpoints.schema import decode, encode
from permprune.checkpoints.source import ModelSource, name_of
from permprune.config import PruneConfig
from permprune.engine.held import Held
from permprune.engine.measuring import Evaluation
from permprune.engine.session import Session
from permprune.engine.stages import stages_of_attempts
from permprune.evaluation.result import gap_closed
from permprune.evaluation.size import model_bytes
from permprune.forecasts.costs import state_bytes
from permprune.jobs.sweep_cells import CELL_FIELDS, Cell, DenseRow, Sweep, SweepRow, of_pattern, pareto, plan_cells
from permprune.models.layers import block_linears, dense_weights, prunable_layers
from permprune.models.processors import Processor
from permprune.pattern import Pattern
from permprune.permuters.base import Run
from permprune.permuters.registry import permuter
from permprune.report.sweep import write_sweep
from permprune.system import distributed
from permprune.system.digests import CALIBRATION, CONFIG, WEIGHTS, versions
from permprune.system.failures import failures_reported
from permprune.system.files import WorkFolder, atomic_folder, require_space, write_json
from permprune.system.progress import stages
from permprune.system.search_state import Checkpoint
from permprune.zoo.models import note

DENSE, CELLS = "dense", "cells"
"""The name under which the row of the dense model is saved in the work folder, and the subfolder of the cells' rows."""

FREE = (*CELL_FIELDS, "batch", "recompute", "memory")
"""Fields of the config that differ between cells, or that may change before an interrupted sweep is resumed."""

T = TypeVar("T")


@failures_reported()
def sweep(
    model: ModelSource,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    patterns: Sequence[str | Pattern],
    methods: Sequence[str],
    budgets: Sequence[float] = (),
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    resume: bool = False,
    announce: Callable[[Sweep], None] = lambda result: None,
) -> Sweep:
    """Measure every combination of pattern, method and budget; write figures.json, report.html and pareto.png to `out`.

    `model` is a name, a folder, or a model in memory with its `processor`. The dense weights of a model in memory are
    restored at the end. Each cell is measured as by `compare`. `patterns`, `methods` (names) and `budgets` replace the
    config's `pattern`, `permute` and `minutes`; no permutation is always measured as well. `budgets` are minutes;
    without them searches have no time limit. Methods that work layer by layer ignore them. A search continues from the
    end of the search with the next smaller budget.

    Until the sweep is complete, `out`.partial contains the row of every finished cell and the states of the searches.
    With `resume` the sweep continues from there, also with more patterns, methods and budgets. `announce` is called
    with the result before it is written. Raises `PermpruneError`.
    """
    config, evaluation = (config or PruneConfig()).completed(), evaluation or Evaluation()
    config.require_no_limit("sweep")
    cells = plan_cells(patterns, methods, budgets)
    with WorkFolder(Path(out)).held("sweep", resume) as work:
        _check(model, cells, config)
        done = distributed.on_first(lambda: Checkpoint(work.path / CELLS, {}).names(""))
        unlimited = config.replace(minutes=None)
        measured = [cell for cell in cells if cell.name not in done] or cells[
            :1
        ]  # one checks that the data are the same
        groups = [list(group) for _, group in groupby(measured, lambda cell: cell.pattern)]
        methods_of = [[permuter(cell.method) for cell in group] for group in groups]
        with stages(*(name for group in methods_of for name in stages_of_attempts(group, unlimited))):
            for group in groups:
                opened = partial(Held.open, model, of_pattern(unlimited, group[0].pattern), processor)
                with Session(opened, dataclasses.replace(evaluation, shown=0)) as session:
                    saved = Checkpoint(work.path, _settings(session, config))
                    _measure_cells(session, group, saved, swept=cells, folder=work.path)
        distributed.wait()  # until the first process has written the last row
        dense, rows = _rows(cells, saved)
        name = name_of(model)
        result = Sweep(model=name, note=note(name), config=config, evaluation=evaluation, dense=dense, rows=rows)
        announce(result)
        distributed.on_first(lambda: _write(result.to_json(), work))
    return result


def _write(result: dict[str, Any], work: WorkFolder) -> None:
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        write_json(folder / "figures.json", result)
        write_sweep(result, folder)


def _check(model: ModelSource, cells: list[Cell], config: PruneConfig) -> None:
    """Raise `PermpruneError` before the sweep starts for arguments that would make it fail later."""
    skeleton = (
        model
        if isinstance(model, PreTrainedModel)
        else read_skeleton(str(model), task=config.task, trust_remote_code=config.trust_remote_code)
    )
    for pattern in dict.fromkeys(cell.pattern for cell in cells):
        prunable_layers(skeleton, of_pattern(config, pattern).parsed_pattern, config.exclude)
    dense_weights(skeleton, [layer.name for layer in block_linears(skeleton)]).warn()  # does not list excluded layers


def _settings(session: Session, config: PruneConfig) -> dict[str, Any]:
    """Return what all rows of a sweep depend on: settings that its cells share, the model, and all data."""
    plan, run = session.weights.plan, session.weights.plan.run
    return {
        **{name: value for name, value in config.identity().items() if name not in FREE},
        **{name: run.checkpoint.settings[name] for name in (CONFIG, WEIGHTS, *versions())},
        CALIBRATION: [plan.measured.digest, run.train.digest, run.held_out.digest],
        "evaluation examples": session.measure.examples.digest,
        **{f"data {name}": value for name, value in dataclasses.asdict(session.evaluation).items()},
    }


def _row_name(cell: Cell) -> str:
    """The name under which the row of a cell is saved in the work folder."""
    return f"{CELLS}/{cell.name}"


def _measure_cells(session: Session, cells: list[Cell], saved: Checkpoint, *, swept: list[Cell], folder: Path) -> None:
    """Measure cells of one pattern one after the other, and save each row as soon as it is measured.

    Raises `PermpruneError` if the row of one that is `swept` is damaged, or was saved with other settings or data.
    """
    run, outline = session.weights.plan.run, session.weights.plan.outline
    require_space(folder, sum(state_bytes(permuter(cell.method), outline) for cell in cells))
    names = [DENSE, *map(_row_name, swept)]
    known = distributed.on_first(lambda: [name for name in names if saved.load(name)])
    if DENSE not in known:
        size = model_bytes(session.weights.model, [], {})
        saved.save(DENSE, {}, encode(DenseRow(overlap=session.overlap, **vars(session.dense), bytes=size)))
    for cell in cells:
        if _row_name(cell) not in known:
            checkpoint = Checkpoint(_states(folder, cell), run.checkpoint.settings)
            row = _row(session, cell, dataclasses.replace(run, minutes=cell.minutes, checkpoint=checkpoint))
            saved.save(_row_name(cell), {}, encode(row))


def _row(session: Session, cell: Cell, run: Run) -> SweepRow:
    """Measure one cell."""
    solution, measurement = session.attempt(permuter(cell.method), cell.method, run)
    network = session.weights.network
    layers, patterns = network.measures(), network.patterns
    return SweepRow(
        **vars(measurement),
        pattern=cell.pattern,
        minutes=cell.minutes,
        bytes=model_bytes(session.weights.model, session.weights.plan.outline.layers, patterns),
        layers=dict(sorted(Counter(map(str, patterns.values())).items())),
        kept=math.fsum(layer.kept for layer in layers) / len(layers),
        error=math.fsum(layer.error for layer in layers) / len(layers),
        curve=list(solution.curve),
    )


def _states(partial: Path, cell: Cell) -> Path:
    """Return the folder of the states of a cell's search; a new one starts as a copy of the next smaller budget's."""
    states = partial / "states" / cell.name
    smaller = [
        other
        for other in states.parent.glob(f"{dataclasses.replace(cell, minutes=None).name} *")
        if other.is_dir() and (cell.minutes is None or _minutes(other) < cell.minutes)
    ]
    if smaller and not states.exists() and not distributed.rank():
        with atomic_folder(states) as copied:
            shutil.copytree(max(smaller, key=_minutes), copied, dirs_exist_ok=True)
    distributed.wait()
    return states


def _minutes(states: Path) -> float:
    return float(states.name.rpartition(" ")[2])


def _rows(cells: list[Cell], saved: Checkpoint) -> tuple[DenseRow, list[SweepRow]]:
    """Read the row of the dense model and those of the cells, in the order of `cells`.

    Sets the fields of the rows that depend on other rows: `gap_closed`, `size` and `front`.
    """
    dense = _saved_row(DenseRow, saved, DENSE)
    rows = [_saved_row(SweepRow, saved, _row_name(cell)) for cell in cells]
    metric, none = dense.result.metric, {row.pattern: row.result.value for row in rows if row.method == "none"}
    front = pareto([(row.bytes, row.result.value) for row in rows], metric)
    return dense, [
        dataclasses.replace(
            row,
            gap_closed=gap_closed(row.result.value, dense.result.value, none[row.pattern], metric=metric),
            size=row.bytes / dense.bytes,
            front=best,
        )
        for row, best in zip(rows, front, strict=True)
    ]


def _saved_row(kind: type[T], saved: Checkpoint, name: str) -> T:
    state = saved.load(name)
    assert state is not None
    row: T = decode(kind, state[1])
    return row
