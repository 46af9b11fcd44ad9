"""The job of `permprune prune`: prune a model and write the checkpoint, its record and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from permprune.checkpoints.io import load
from permprune.checkpoints.offload import read_shapes, read_size
from permprune.checkpoints.origin import origin_of
from permprune.checkpoints.record import Record, read_record
from permprune.checkpoints.source import ModelSource, name_of
from permprune.config import PruneConfig
from permprune.engine.held import Held, open_to_prune
from permprune.engine.limiting import keep_within, warn_of_packing
from permprune.engine.measuring import Evaluation, require_data
from permprune.engine.pruned import Pruned
from permprune.engine.session import Session
from permprune.engine.sharded import Offloading, Sharded
from permprune.engine.stages import expected, stages_of_pruning
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.costs import state_bytes
from permprune.forecasts.efforts import resolve
from permprune.forecasts.fitting import crowding, fit_memory
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.run import forecast_plan
from permprune.inference.pack import head_names, packed_type
from permprune.jobs.packing import pack_folder
from permprune.jobs.speeds import add_speeds
from permprune.kernels.product.layout import require_packable
from permprune.models.dummy_inputs import processed_size
from permprune.models.processors import Processor
from permprune.permuters.base import Callback
from permprune.plan import Plan
from permprune.pruning.folder import write_pruned, write_record
from permprune.system import distributed
from permprune.system.device import best_device
from permprune.system.failures import failures_reported
from permprune.system.files import WorkFolder, atomic_folder, require_space
from permprune.system.memory import peak_memory_mb, reset_peak_memory
from permprune.system.progress import MEASURE, PACK, SPEED, Stages, log, stage, stages
from permprune.system.shelf import Room


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
    config, evaluation = (config or PruneConfig()).packed_as(pack, head), evaluation or Evaluation()
    require_data(config, evaluation)
    job = _Job(model, config, evaluation, processor, pack, tuple(callbacks), begin, announce)
    with stages() as shown:
        with WorkFolder(Path(out)).held("prune", resume) as work:
            record, runs = job.run(work, shown)
        if runs and not job.in_memory and distributed.rank() == 0:
            stage(SPEED)
            record = add_speeds(Path(out), str(model), config)
    return record


@dataclasses.dataclass(frozen=True)
class _Job:
    """What `prune_to_folder` is asked for."""

    model: ModelSource
    config: PruneConfig
    evaluation: Evaluation
    processor: Processor | None
    pack: str | None
    callbacks: tuple[Callback, ...]
    begin: Callable[[Forecast], None]
    announce: Callable[[Record], None]

    @property
    def in_memory(self) -> bool:
        """Whether the model was given, and is not read."""
        return isinstance(self.model, PreTrainedModel)

    def run(self, work: WorkFolder, shown: Stages) -> tuple[Record, bool]:
        """Prune a model and write its folder, as `prune_to_folder`, and free it.

        Returns the record, and whether the models run in the memory of one process.
        """
        name, asked = name_of(self.model), {**self.config.to_json(), **vars(self.evaluation)}
        distributed.require_same({"model": name, **asked, "pack": self.pack, "head": self.config.packed_head})
        reset_peak_memory()
        started = time.monotonic()
        config, fitted, crowded = self.fitted()
        if fitted is not None:
            require_space(work.out, sum(fitted.disk.values()))
        divided = fitted is not None and fitted.shards > 1
        alone = not divided and config.offload == "none" and not self.in_memory
        shown.plan(stages_of_pruning(config, packed=self.pack is not None, timed=alone))

        def forecast(known: Forecast) -> None:
            if crowded:  # told when the model was read: a damaged one is an error alone
                log.warning("%s", crowded)
            shown.expect(*expected(known))
            self.begin(known)

        with ExitStack() as inside:
            if fitted is not None and divided:
                forecast(fitted)
                inside.enter_context(distributed.dividing_rows())
            open_weights = self.opening(config, fitted, work, partial(self.forecast_time, forecast))
            session = inside.enter_context(Session(open_weights, self.evaluation))
            weights = session.weights
            weights.plan.dense.warn()
            if session.choosing is not None:
                keep_within(session, self.callbacks)
            pruned, record = session.prune(callbacks=self.callbacks)
            seconds = {**record.seconds, "total": time.monotonic() - started}
            record = dataclasses.replace(record, seconds=seconds, peak_memory_mb=peak_memory_mb())
            self.announce(record)
            write = partial(write_pruned_weights, weights, pruned, record, work, pack=self.pack)
            distributed.on_first(write, others=weights.serve)
            if self.pack is not None and distributed.world() == 1:
                record = self.measured_packed(session, work.out)
        return record, not weights.unanswering

    def measured_packed(self, session: Session, folder: Path) -> Record:
        """Measure the packed model in a folder, if packing changed values, and write that into its record."""
        record, config = read_record(folder), session.weights.plan.config
        if record.measured is None or record.measured.packed == self.pack:
            return record
        stage(MEASURE)
        model = nn.Module.to(load(folder, trust_remote_code=config.trust_remote_code), best_device())
        record = session.with_packed(record, model)
        write_record(record, folder)
        if config.max_loss is not None and record.measured is not None:
            warn_of_packing(record.measured, session.dense.result, config.max_loss)
        return record

    def fitted(self) -> tuple[PruneConfig, Forecast | None, str]:
        """The settings, with what the effort and the limits lead to, and the forecast from which the latter follow.

        Without a limit there is no forecast, and a warning if memory is too small for the run.
        Raises `PermpruneError` for what cannot be packed, offloaded or fitted.
        """
        config = self.config
        if self.pack is not None:
            require_packable(config.parsed_pattern, packed_type(self.pack))
        shapes, stored, size = self.shapes()
        head_names(shapes, config.packed_head)  # raises
        config = resolve(shapes, config, size)
        name, windows = str(self.model), self.evaluation.windows
        fitted = None if self.in_memory else fit_memory(name, config, windows)
        crowded = ""
        if fitted is None and not self.in_memory:
            crowded = crowding(name, shapes, config, windows=windows, stored=stored, size=size)
        config = config if fitted is None else fitted.config
        if config.offload != "none" and (self.in_memory or distributed.world() > 1):
            raise PermpruneError("only one process offloads, and a model that it reads itself: leave offload out")
        return config, fitted, crowded

    def shapes(self) -> tuple[PreTrainedModel, torch.dtype, tuple[int, int] | None]:
        """The model, or one without numbers in place of a model that is read, its stored type, and its images' size."""
        if isinstance(self.model, PreTrainedModel):
            return self.model, origin_of(self.model).dtype, processed_size(self.processor)
        name, code = str(self.model), self.config.trust_remote_code
        shapes, stored = read_shapes(name, task=self.config.task, trust_remote_code=code)
        return shapes, stored, read_size(name, shapes, trust_remote_code=code)

    def opening(
        self,
        config: PruneConfig,
        fitted: Forecast | None,
        work: WorkFolder,
        planned: Callable[[PreTrainedModel, Plan], None],
    ) -> Callable[[], Held]:
        """What opens and calibrates the model: divided among processes, offloaded, or held in memory."""
        if fitted is not None and fitted.shards > 1:
            return partial(Sharded, str(self.model), config, work)
        if fitted is not None and config.offload != "none":
            return partial(Offloading, str(self.model), config, work, planned, Room(*fitted.room))
        return partial(self.held, config, work, planned)

    def held(self, config: PruneConfig, work: WorkFolder, planned: Callable[[PreTrainedModel, Plan], None]) -> Held:
        """Open and calibrate a model that is held in memory."""
        opened = open_to_prune(self.model, config, self.processor)
        needed = weight_bytes(opened.model, opened.stored)
        require_space(work.out, needed)
        ready = partial(planned, opened.model)
        fisher = config.recipe.order.uses_fisher
        held = Held.of(opened, config, spare=not self.in_memory, partial=work.path, planned=ready, fisher=fisher)
        require_space(work.out, needed + state_bytes(config.recipe, held.plan.outline))
        return held

    def forecast_time(self, begin: Callable[[Forecast], None], opened: PreTrainedModel, plan: Plan) -> None:
        """Begin with the forecast of a plan, if the model runs without numbers."""
        try:
            known = forecast_plan(opened, plan, self.evaluation.windows)
        except PermpruneError:
            raise
        except Exception as error:  # a model's own code can raise any type
            log.warning("the time is not known, as the model does not run without numbers: %s", first_line(error))
            return
        begin(known)


def write_pruned_weights(
    weights: Held, pruned: Pruned, record: Record, work: WorkFolder, *, pack: str | None = None
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
        head=config.packed_head,
        calibration=config if pack == "int4" else None,
        trust_remote_code=config.trust_remote_code,
    ).warn()
