"""The job of `permprune compare`: measure every combination of pattern, method and time budget on one model."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

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
from permprune.jobs.cells import CELL_FIELDS, Cell, Comparison, ComparisonRow, DenseRow, of_pattern, pareto, plan_cells
from permprune.models.layers import block_linears, dense_weights, prunable_layers
from permprune.models.processors import Processor
from permprune.pattern import Pattern
from permprune.permuters.base import Permuter
from permprune.permuters.registry import permuters
from permprune.registry import describe
from permprune.report.comparison import write_comparison
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
"""Fields of the config that differ between cells, or that may change before an interrupted comparison is resumed."""


@failures_reported()
def compare(
    model: ModelSource,
    methods: Sequence[str | Permuter] | Mapping[str, str | Permuter],
    config: PruneConfig | None = None,
    *,
    patterns: Sequence[str | Pattern] = (),
    budgets: Sequence[float] = (),
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    announce: Callable[[Comparison], None] = lambda result: None,
) -> Comparison:
    """Measure every combination of pattern, method and budget on one model.

    `model` is a name, a folder, or a model in memory with its `processor`, which has its dense weights again at the
    end. `methods` are names or objects, or a mapping of labels to these; the dense model and no permutation are always
    measured as well. They, `patterns` and `budgets` (minutes of a search) replace the config's `order`, `pattern` and
    `minutes`; methods that work layer by layer have no budget. With `out`, figures.json and report.html are
    written to that folder, after `announce` was called with the result. Until then `out`.partial has the row of every
    finished cell and the states of the searches: with `resume` the comparison continues from there, also with more
    cells, and a search goes on where the one with the next smaller budget ended. Raises `PermpruneError`.
    """
    config, evaluation = (config or PruneConfig()).completed(), evaluation or Evaluation()
    config.require_no_limit("compare")
    chosen = {**permuters(["none"]), **permuters(methods)}
    minutes = [] if config.minutes is None else [config.minutes]
    cells = plan_cells(patterns or [config.pattern], chosen, budgets or minutes)
    _check(model, cells, config)
    with WorkFolder(Path(out)).held("compare", resume) if out else nullcontext() as work:
        measuring = _Measuring(model, config, evaluation, processor, chosen, work.path if work else None)
        result = measuring.compared(cells)
        announce(result)
        if work:
            distributed.on_first(lambda: _write(result.to_json(), work))
    return result


def _write(result: dict[str, Any], work: WorkFolder) -> None:
    with atomic_folder(work.out, work.scratch, "free space, then repeat with --resume") as folder:
        write_json(folder / "figures.json", result)
        write_comparison(result, folder)


def _check(model: ModelSource, cells: list[Cell], config: PruneConfig) -> None:
    """Raise `PermpruneError` before anything is measured for arguments that would make it fail later."""
    skeleton = (
        model
        if isinstance(model, PreTrainedModel)
        else read_skeleton(str(model), task=config.task, trust_remote_code=config.trust_remote_code)
    )
    for pattern in dict.fromkeys(cell.pattern for cell in cells):
        prunable_layers(skeleton, of_pattern(config, pattern).parsed_pattern, config.exclude)
    dense_weights(skeleton, [layer.name for layer in block_linears(skeleton)]).warn()  # does not list excluded layers


@dataclasses.dataclass
class _Measuring:
    """The rows of a comparison: those that an interrupted one saved in a folder, if there is one, and others."""

    model: ModelSource
    config: PruneConfig
    evaluation: Evaluation
    processor: Processor | None
    methods: Mapping[str, Permuter]
    folder: Path | None
    dense: DenseRow | None = None
    rows: dict[Cell, ComparisonRow] = dataclasses.field(default_factory=dict)

    def compared(self, cells: list[Cell]) -> Comparison:
        """Measure the cells that are not saved, those of one pattern after one calibration."""
        done = distributed.on_first(lambda: Checkpoint(self.folder and self.folder / CELLS, {}).names(""))
        left = [cell for cell in cells if cell.name not in done] or cells[:1]  # one checks that the data are the same
        groups = [list(group) for _, group in groupby(left, lambda cell: cell.pattern)]
        unlimited, measured = self.config.replace(minutes=None), dataclasses.replace(self.evaluation, shown=0)
        orders = [[self.methods[cell.method] for cell in group] for group in groups]
        with stages(*(name for group in orders for name in stages_of_attempts(group, unlimited))):
            for group in groups:
                opened = partial(Held.open, self.model, of_pattern(unlimited, group[0].pattern), self.processor)
                with Session(opened, measured) as session:
                    self.load(session, cells)
                    self.measure(session, group)
        assert self.dense is not None
        name = name_of(self.model)
        rows = related([self.rows[cell] for cell in cells], self.dense)
        return Comparison(
            model=name, note=note(name), config=self.config, evaluation=self.evaluation, dense=self.dense, rows=rows
        )

    def saved(self, session: Session, cell: Cell | None) -> Checkpoint:
        """Where the row of a cell is saved, or of the dense model, with all that it depends on: settings and data."""
        plan, run = session.weights.plan, session.weights.plan.run
        settings = {
            **{name: value for name, value in self.config.identity().items() if name not in FREE},
            **{name: run.checkpoint.settings[name] for name in (CONFIG, WEIGHTS, *versions())},
            CALIBRATION: [plan.measured.digest, run.train.digest, run.held_out.digest],
            "evaluation examples": session.measure.examples.digest,
            **{f"data {name}": value for name, value in dataclasses.asdict(session.evaluation).items()},
            **({} if cell is None else {"method": describe(self.methods[cell.method])}),
        }
        return Checkpoint(self.folder, settings)

    def load(self, session: Session, cells: list[Cell]) -> None:
        """Load the rows that are saved. Raises `PermpruneError` if one is damaged, or has other settings or data."""

        def values(cell: Cell | None) -> dict[str, Any] | None:
            state = self.saved(session, cell).load(DENSE if cell is None else f"{CELLS}/{cell.name}")
            return state and state[1]

        if self.folder is None or self.rows:
            return
        dense, *rows = distributed.on_first(lambda: [values(cell) for cell in (None, *cells)])
        self.dense = None if dense is None else decode(DenseRow, dense)
        self.rows = {cell: decode(ComparisonRow, row) for cell, row in zip(cells, rows, strict=True) if row}

    def measure(self, session: Session, cells: list[Cell]) -> None:
        """Measure cells of one pattern one after the other, and save each row as soon as it is measured."""
        outline, run = session.weights.plan.outline, session.weights.plan.run
        if self.folder:
            require_space(self.folder, sum(state_bytes(self.methods[cell.method], outline) for cell in cells))
        if self.dense is None:
            size = model_bytes(session.weights.model, [], {})
            self.dense = DenseRow(overlap=session.overlap, **vars(session.dense), bytes=size)
            self.saved(session, None).save(DENSE, {}, encode(self.dense))
        for cell in (cell for cell in cells if cell not in self.rows):
            states = Checkpoint(self.folder and _states(self.folder, cell), run.checkpoint.settings)
            self.rows[cell] = row = self.row(session, cell, states)
            self.saved(session, cell).save(f"{CELLS}/{cell.name}", {}, encode(row))

    def row(self, session: Session, cell: Cell, states: Checkpoint) -> ComparisonRow:
        """Measure one cell."""
        weights = session.weights
        run = dataclasses.replace(weights.plan.run, minutes=cell.minutes, checkpoint=states)
        solution, measurement = session.attempt(self.methods[cell.method], cell.method, run)
        layers, patterns = weights.network.measures(), weights.network.patterns
        return ComparisonRow(
            **vars(measurement),
            pattern=cell.pattern,
            minutes=cell.minutes,
            bytes=model_bytes(weights.model, weights.plan.outline.layers, patterns),
            layers=dict(sorted(Counter(map(str, patterns.values())).items())),
            kept=math.fsum(layer.kept for layer in layers) / len(layers),
            error=math.fsum(layer.error for layer in layers) / len(layers),
            curve=list(solution.curve),
        )


def _states(folder: Path, cell: Cell) -> Path:
    """Return the folder of the states of a cell's search; a new one starts as a copy of the next smaller budget's."""
    states = folder / "states" / cell.name
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


def related(rows: list[ComparisonRow], dense: DenseRow) -> list[ComparisonRow]:
    """Return rows with the fields that depend on other rows: `gap_closed`, `size` and `front`."""
    metric, none = dense.result.metric, {row.pattern: row.result.value for row in rows if row.method == "none"}
    front = pareto([(row.bytes, row.result.value) for row in rows], metric)
    return [
        dataclasses.replace(
            row,
            gap_closed=gap_closed(row.result.value, dense.result.value, none[row.pattern], metric=metric),
            size=row.bytes / dense.bytes,
            front=best,
        )
        for row, best in zip(rows, front, strict=True)
    ]
