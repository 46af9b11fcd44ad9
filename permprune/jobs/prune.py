"""The job of `permprune prune`: prune a model and write the checkpoint, its record and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from permprune.checkpoints.offload import read_shapes, read_size
from permprune.checkpoints.record import Record
from permprune.checkpoints.source import ModelSource, name_of
from permprune.config import PruneConfig
from permprune.engine.held import Held, open_to_prune
from permprune.engine.limiting import keep_within
from permprune.engine.measuring import Evaluation, require_data
from permprune.engine.pruned import Pruned
from permprune.engine.session import Session
from permprune.engine.sharded import Offloading, Sharded
from permprune.engine.stages import expected, stages_of_pruning
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.costs import state_bytes
from permprune.forecasts.efforts import resolve
from permprune.forecasts.fitting import fit_memory
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.run import forecast_plan
from permprune.inference.pack import head_names, packed_type
from permprune.jobs.packing import pack_folder
from permprune.jobs.speeds import add_speeds
from permprune.kernels.product.layout import require_packable
from permprune.models.dummy_inputs import processed_size
from permprune.models.processors import Processor
from permprune.permuters.base import Callback
from permprune.permuters.registry import permuter
from permprune.permuters.trust_region import TrustRegion
from permprune.plan import Plan
from permprune.pruning.folder import write_pruned
from permprune.system import distributed
from permprune.system.failures import failures_reported
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.progress import log, stage, stages
from permprune.system.shelf import Room
from permprune.system.stages import PACK, SPEED, Stages

INT4_SHARE = 0.33
"""The share of the training that goes through int4 values if the weights are packed so."""


@failures_reported()
def prune_to_folder(
    model: ModelSource,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    evaluation: Evaluation | None = None,
    processor: Processor | None = None,
    pack: str | None = None,
    head: str | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    begin: Callable[[Forecast], None] = lambda forecast: None,
    announce: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Permute, prune, update, fold, measure, and write the checkpoint, its record and its report to the folder `out`.

    `model` is a name, a folder, or a model in memory with its `processor`, which is pruned in place; `config.memory`
    then limits only the statistics. Of the processes that `torchrun` starts each holds the whole model, or they divide
    the rows of its weights (`config.shard`). With `pack` and `head`, the `dtype` and the `head` of `permprune.pack`,
    the weights are written packed. Until the run is complete, all files including the state of the search are in
    `out`.partial. With `resume` the search continues from its last state. `callbacks` are as in `prune`. `begin` is
    called with the forecast of the run before the calibration, and `announce` with the record before anything is
    written to `out`. Returns the record. Raises `PermpruneError`.
    """
    config, evaluation = config or PruneConfig(), evaluation or Evaluation()
    if head is not None and pack is None:
        raise PermpruneError(f"head is {head}, which is for packed weights: give pack too, such as int8")
    require_data(config, evaluation)
    with stages() as shown:
        record, runs = _prune(
            model,
            Path(out),
            config,
            evaluation=evaluation,
            processor=processor,
            pack=pack,
            head=head,
            resume=resume,
            callbacks=callbacks,
            begin=begin,
            announce=announce,
            shown=shown,
        )
        if runs and not isinstance(model, PreTrainedModel) and distributed.rank() == 0:
            stage(SPEED)
            record = add_speeds(Path(out), str(model), config)
    return record


def _prune(
    model: ModelSource,
    out: Path,
    config: PruneConfig,
    *,
    evaluation: Evaluation,
    processor: Processor | None,
    pack: str | None,
    head: str | None,
    resume: bool,
    callbacks: Sequence[Callback],
    begin: Callable[[Forecast], None],
    announce: Callable[[Record], None],
    shown: Stages,
) -> tuple[Record, bool]:
    """Prune a model and write its folder, as `prune_to_folder`, and free it.

    Returns the record, and whether the models run in the memory of one process.
    """
    with WorkFolder(out).held("prune", resume) as work, ExitStack() as inside:
        distributed.require_same(
            {"model": name_of(model), **config.to_json(), **vars(evaluation), "pack": pack, "head": head}
        )
        reset_peak_memory()
        started = time.monotonic()
        if pack is not None:
            require_packable(config.parsed_pattern, packed_type(pack))
            config = config.replace(packed=pack, packed_head=head)
        shapes, size = _shapes(model, processor, config)
        head_names(shapes, head)  # raises
        config = resolve(shapes, config, size)
        if pack == "int4":
            config = _through_int4(config)
        fitted = None if isinstance(model, PreTrainedModel) else fit_memory(str(model), config, evaluation.windows)
        if fitted is not None:
            config = fitted.config
            require_space(work.out, sum(fitted.disk.values()))
        offloads = config.offload != "none"
        if offloads and (isinstance(model, PreTrainedModel) or distributed.world() > 1):
            raise PermpruneError("only one process offloads, and a model that it reads itself: leave --offload out")
        divided = fitted is not None and fitted.shards > 1
        alone = not divided and not offloads and not isinstance(model, PreTrainedModel)
        shown.plan(stages_of_pruning(config, packed=pack is not None, timed=alone))

        def forecast(time_forecast: Forecast) -> None:
            shown.expect(*expected(time_forecast))
            begin(time_forecast)

        def planned(opened: PreTrainedModel, plan: Plan) -> None:
            try:
                time_forecast = forecast_plan(opened, plan, evaluation.windows)
            except PermpruneError:
                raise
            except Exception as error:  # a model's own code can raise any type where it runs without numbers
                log.warning("the time is not known, as the model does not run without numbers: %s", first_line(error))
                return
            forecast(time_forecast)

        open_weights: Callable[[], Held] = partial(_held, model, config, processor, work, planned)
        if fitted is not None and divided:
            forecast(fitted)
            inside.enter_context(distributed.dividing_rows())
            open_weights = partial(Sharded, str(model), config, work)
        elif fitted is not None and offloads:
            open_weights = partial(Offloading, str(model), config, work, planned, Room(*fitted.room))
        session = inside.enter_context(Session(open_weights, evaluation))
        weights = session.weights
        weights.plan.dense.warn()
        method, called = permuter(weights.plan.config.permute), tuple(callbacks)
        if session.choosing is not None:
            keep_within(session, method, called)
        pruned, record = session.prune(method, callbacks=called)
        seconds = {**record.seconds, "total": time.monotonic() - started}
        record = dataclasses.replace(record, seconds=seconds, peak_memory_mb=peak_memory_mb())
        announce(record)
        write = partial(write_pruned_weights, weights, pruned, record, work, pack=pack, head=head)
        distributed.on_first(write, others=weights.serve)
    return record, not weights.unanswering


def _through_int4(config: PruneConfig) -> PruneConfig:
    """Let a search that trains at its end do so through int4 values, unless it says how."""
    method = permuter(config.permute)
    if not isinstance(method, TrustRegion) or not method.trains_at_end or method.int4:
        return config
    return config.replace(permute=dataclasses.replace(method, int4=INT4_SHARE))


def _shapes(
    model: ModelSource, processor: Processor | None, config: PruneConfig
) -> tuple[PreTrainedModel, tuple[int, int] | None]:
    """The model, or one without numbers in place of a model that is read, and the size of its images."""
    if isinstance(model, PreTrainedModel):
        return model, processed_size(processor)
    shapes, _ = read_shapes(str(model), task=config.task, trust_remote_code=config.trust_remote_code)
    return shapes, read_size(str(model), shapes, trust_remote_code=config.trust_remote_code)


def _held(
    model: ModelSource,
    config: PruneConfig,
    processor: Processor | None,
    work: WorkFolder,
    planned: Callable[[PreTrainedModel, Plan], None],
) -> Held:
    """Open and calibrate a model that is held in memory."""
    opened = open_to_prune(model, config, processor)
    needed = weight_bytes(opened.model, opened.stored)
    require_space(work.out, needed)
    ready = partial(planned, opened.model)
    fisher, spare = permuter(config.permute).uses_fisher, opened.model is not model
    held = Held.of(opened, config, spare=spare, partial=work.path, planned=ready, fisher=fisher)
    require_space(work.out, needed + state_bytes(permuter(config.permute), held.plan.outline))
    return held


def write_pruned_weights(
    weights: Held,
    pruned: Pruned,
    record: Record,
    work: WorkFolder,
    *,
    pack: str | None = None,
    head: str | None = None,
) -> None:
    """Write the output folder; with `pack`, write the unpacked checkpoint to the work folder first and pack that.

    Values of int4 are solved on the calibration data of the run.
    """
    out = work.out if pack is None else work.scratch / "pruned"
    with weights.served(), atomic_folder(out, work.scratch, "free space, then repeat with --resume") as folder:
        write_pruned(record, pruned.probe, partial(weights.write, pruned=pruned), folder, load=weights.load)
    if pack is None:
        return
    stage(PACK)
    config = weights.plan.config
    pack_folder(
        out,
        work.out,
        dtype=pack,
        head=head,
        calibration=config if pack == "int4" else None,
        trust_remote_code=config.trust_remote_code,
    ).warn()
