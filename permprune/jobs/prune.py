"""The job of `permprune prune`: prune a model and write the checkpoint, its record and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from permprune.checkpoints.io import load_written, write_weights
from permprune.checkpoints.offload import load_written_offloaded, read_offloaded, write_offloaded
from permprune.checkpoints.origin import origin_of, set_origin
from permprune.checkpoints.record import Measured, Record
from permprune.checkpoints.source import ModelSource, OpenModel, name_of, open_model
from permprune.config import PruneConfig
from permprune.data.overlap import warn_of_overlap
from permprune.evaluation.perplexity import perplexity
from permprune.evaluation.result import Result, gap_closed, metric_named
from permprune.evaluation.size import weight_bytes
from permprune.examples import Examples
from permprune.forecasts.costs import state_bytes
from permprune.forecasts.fitting import fit_memory
from permprune.inference.pack import packed_type
from permprune.jobs.divided import DividedModel
from permprune.jobs.packing import pack_folder
from permprune.jobs.streaming import DECIDED, NATURAL, Stream
from permprune.jobs.trials import Evaluation, Meter
from permprune.kernels.layout import require_packable
from permprune.models.narrow_weights import is_narrow
from permprune.models.processors import Processor
from permprune.pattern import parse_pattern
from permprune.permuters.base import Callback, Solution
from permprune.permuters.registry import permuter
from permprune.pipeline import Prepared, Pruned, finish, prepare, update_weights
from permprune.plan import Plan, calibration_examples, plan_run
from permprune.pruning.folder import write_pruned
from permprune.pruning.masked import LayerMeasure
from permprune.system import distributed
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.out_of_memory import memory_reported
from permprune.system.progress import log


@memory_reported()
def prune_to_folder(
    model: ModelSource,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    pack: str | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    announce: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Permute, prune, update, fold, measure, and write the checkpoint, its record and its report to the folder `out`.

    `model` is a name, a folder, or a model in memory with its `processor`, which is pruned in place; `config.memory`
    then limits only the statistics. Of the processes that `torchrun` starts each holds the whole model, or they divide
    the rows of its weights (`config.shard`). With `pack`, a `dtype` of `permprune.pack`, the weights are written
    packed. Until the run is complete, all files including the state of the search are in `out`.partial. With `resume`
    the search continues from its last state. `callbacks` are as in `prune`. `announce` is called with the record before
    anything is written to `out`. Returns the record. Raises `PermpruneError`.
    """
    config, evaluation = config or PruneConfig(), evaluation or Evaluation()
    with WorkFolder(Path(out)).held("prune", resume) as work, ExitStack() as inside:
        distributed.require_same({"model": name_of(model), **config.to_json(), **vars(evaluation), "pack": pack})
        reset_peak_memory()
        started = time.monotonic()
        if pack is not None:
            require_packable(parse_pattern(config.pattern), packed_type(pack))
        fitted = None if isinstance(model, PreTrainedModel) else fit_memory(str(model), config)
        if fitted is not None:
            config = fitted.config
            require_space(work.out, sum(fitted.disk.values()))
        if fitted is not None and fitted.shards > 1:
            inside.enter_context(distributed.dividing_rows())
            done = _prune_divided(str(model), config, evaluation, work, callbacks)
        elif fitted is not None and fitted.streamed:
            done = _prune_streamed(str(model), config, evaluation, work)  # no callbacks: the method has no rounds
        else:
            opened = open_model(model, processor, trust_remote_code=config.trust_remote_code)
            done = _prune_held(opened, config, evaluation, work, callbacks, spare=opened.model is not model)
        measured = done.measured
        metric = metric_named(measured.metric)
        record = dataclasses.replace(
            done.pruned.record(),
            measured=measured,
            gap_closed=gap_closed(measured.pruned, measured.dense, measured.none, metric=metric),
            seconds={**done.seconds, "total": time.monotonic() - started},
            peak_memory_mb=peak_memory_mb(),
        )
        announce(record)
        distributed.on_first(lambda: _write(done, record, work, pack), others=done.serve)
    return record


@dataclasses.dataclass
class _Done:
    """A pruned model, its measurements, and the functions that write its weights and processor to a folder and load it.

    The first process writes; meanwhile the others `serve` the rows that they hold, until the end of `served`.
    """

    pruned: Pruned
    measured: Measured
    seconds: dict[str, float]
    write: Callable[[Path], None]
    load: Callable[[Path], PreTrainedModel]
    served: Callable[[], AbstractContextManager[None]] = nullcontext
    serve: Callable[[], None] = lambda: None


def _prune_held(
    opened: OpenModel,
    config: PruneConfig,
    evaluation: Evaluation,
    work: WorkFolder,
    callbacks: Sequence[Callback],
    *,
    spare: bool,
) -> _Done:
    """Prune a model in memory; with `spare`, it makes room for the written one when that is loaded to be checked."""
    method = permuter(config.permute)
    model, processor, stored = opened.model, opened.processor, opened.stored
    set_origin(model, origin_of(model))
    require_space(work.out, weight_bytes(model, stored))
    prepared = prepare(model, processor, config, partial=work.path)
    prepared.dense.warn()
    require_space(work.out, weight_bytes(model, stored) + state_bytes(method, prepared.outline))
    found = _search(prepared, processor, evaluation, callbacks)
    pruned = finish(prepared, found.solution, found.natural)
    measured = found.measured(evaluation)

    def load(folder: Path) -> PreTrainedModel:
        if spare:
            model.to("meta")  # type: ignore[arg-type]
        return load_written(model, folder)

    write = partial(write_weights, model, processor, stored)
    return _Done(pruned, measured, found.seconds, write, load)


@dataclasses.dataclass
class _Found:
    """The solution of a search, the layers in natural order, and the model's results so far."""

    solution: Solution
    natural: list[LayerMeasure]
    measure: Meter
    dense: Result
    none: Result
    overlap: float
    seconds: dict[str, float]

    def measured(self, evaluation: Evaluation) -> Measured:
        """Measure the pruned model."""
        return evaluation.measured(self.dense, self.none, self.measure(), overlap=self.overlap)


def _search(
    prepared: Prepared, processor: Processor | None, evaluation: Evaluation, callbacks: Sequence[Callback]
) -> _Found:
    """Measure a prepared model, dense and in natural order; find orders; and update the weights."""
    with prepared.network.dense_weights():
        measure = Meter(prepared.model, processor, evaluation)
        dense = measure()
    overlap = _said_overlap(prepared, measure.examples)
    update_weights(prepared)
    natural, none = prepared.network.measures(), measure()
    run = dataclasses.replace(prepared.run, callbacks=tuple(callbacks))
    solution = permuter(prepared.config.permute).solve(prepared.network, run)
    searched = time.monotonic()
    update_weights(prepared)
    seconds = {"calibrate": prepared.seconds, "search": solution.seconds, "update": time.monotonic() - searched}
    return _Found(solution, natural, measure, dense, none, overlap, seconds)


def _prune_divided(
    name: str, config: PruneConfig, evaluation: Evaluation, work: WorkFolder, callbacks: Sequence[Callback]
) -> _Done:
    """Prune a model of whose weights each process holds some rows."""
    model = DividedModel(name, config, work)
    model.prepared.dense.warn()
    found = _search(model.prepared, model.processor, evaluation, callbacks)
    measured = found.measured(evaluation)
    pruned = model.finish(found.solution, found.natural)
    write = partial(model.write, gathered=bool(pruned.gathers))
    load = partial(load_written_offloaded, model.whole, scratch=work.scratch / "written")
    return _Done(pruned, measured, found.seconds, write, load, model.collected.served, model.collected.serve)


def _prune_streamed(name: str, config: PruneConfig, evaluation: Evaluation, work: WorkFolder) -> _Done:
    """Prune a model that is read layer by layer, as `fit_memory` decided."""
    started = time.monotonic()
    rank, trust = f"rank-{distributed.rank()}", config.trust_remote_code
    model, processor, stored, weights = read_offloaded(name, work.scratch / rank, trust_remote_code=trust)
    examples = evaluation.examples(model, processor)
    shown = calibration_examples(model, processor, config)
    plan = plan_run(model, config, examples=shown, weights=weights.stored)
    plan.dense.warn()
    overlap = _said_overlap(plan, examples)
    stream = Stream(model, weights, plan, work.path / rank, half=is_narrow(stored))
    pruned = stream.solve()
    calibrated = time.monotonic() - started - stream.seconds
    seconds = {"calibrate": calibrated, "search": pruned.solution.seconds, "update": 0.0}
    results = []
    for edit in (None, stream.masked(NATURAL), stream.masked(DECIDED)):
        weights.edit = edit
        results.append(perplexity(model, examples))
    weights.edit = stream.stored(pruned)

    def write(folder: Path) -> None:
        write_offloaded(
            model,
            processor,
            weights,
            dtype=stored,
            gathered=bool(pruned.gathers),
            folder=folder,
            memory=cast(int, config.memory),
        )

    load = partial(load_written_offloaded, model, scratch=work.scratch / "written")
    return _Done(pruned, evaluation.measured(*results, overlap=overlap), seconds, write, load)


def _said_overlap(plan: Plan, examples: Examples) -> float:
    """Return the share of the evaluation data that the calibration data contain; logs a warning if it is large."""
    share = plan.overlap(examples)
    warn_of_overlap(share)
    return share


def _write(done: _Done, record: Record, work: WorkFolder, pack: str | None) -> None:
    """Write the output folder; with `pack`, write the unpacked checkpoint to the work folder first and pack that."""
    out = work.out if pack is None else work.scratch / "pruned"
    with done.served(), atomic_folder(out, work.scratch, "free space, then repeat with --resume") as folder:
        write_pruned(record, done.pruned.probe, done.write, folder, load=done.load)
    if pack is not None and (dense := pack_folder(out, work.out, dtype=pack).left_dense):
        log.warning("of a type that has no packed form, and so written with their zeros: %s", ", ".join(dense))
