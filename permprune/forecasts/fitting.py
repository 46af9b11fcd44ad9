"""Settings of a run that fit in a memory limit: those given, leaner ones, or weights that processes divide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from permprune.checkpoints.offload import read_shapes, read_size, read_skeleton
from permprune.checkpoints.weights import GATHERED
from permprune.config import PruneConfig
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.efforts import resolve
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.machine import Machine, machine_named, this_machine
from permprune.forecasts.run import Subject, forecast_held
from permprune.models.modality import EVALUATION_WINDOWS, kind_of
from permprune.models.row_shards import require_divisible
from permprune.options import Count, require
from permprune.pattern import MIXED
from permprune.permuters.registry import PERMUTERS
from permprune.plan import outline_model
from permprune.registry import describe
from permprune.system import distributed
from permprune.system.failures import failures_reported
from permprune.system.files import gib
from permprune.system.progress import log
from permprune.zoo.models import resolve_model

ROOMY, LEAST = 10, 2**31
"""What a run needs at the most with default settings: so many times the bytes of its weights in fp32, and so many."""


@failures_reported()
def forecast(
    name: str,
    config: PruneConfig | None = None,
    *,
    windows: int = EVALUATION_WINDOWS,
    gpu: str | None = None,
    processes: Count | None = None,
) -> Forecast:
    """Forecast a run of `prune_to_folder`: memory by stage and part, disk space and time.

    `name` is a zoo name, a hub id, or a folder, of which only config.json is read. `windows` is the number of windows
    of the evaluation. `gpu` is the name of a GPU (`permprune.forecasts.machine.GPUS`), by default that of this machine,
    or its CPU. `processes` is the number that `torchrun` starts, by default that of this run. With `config.memory`, a
    limit for each process, the settings are those that `prune_to_folder` would choose; without it, `advice` names
    settings that fit in the memory of the machine, if those given do not. Raises `PermpruneError`, also if no settings
    fit in `config.memory`.
    """
    config, processes = config or PruneConfig(), distributed.world() if processes is None else processes
    require("processes", processes, Count)
    model, stored = read_shapes(name, task=config.task, trust_remote_code=config.trust_remote_code)
    size = read_size(name, model, trust_remote_code=config.trust_remote_code)
    config = resolve(model, config, size)
    outline, machine = outline_model(model, config), machine_named(gpu)
    fitting = Fitting(name, model, outline, machine, windows=windows, stored=stored, processes=processes, size=size)
    fitting.require_offloadable(config)
    if config.memory is not None:
        return fitting.within(config, config.memory)
    return fitting.together(config) if processes > 1 or config.shard else fitting.advised(config)


def fit_memory(name: str, config: PruneConfig, windows: int = EVALUATION_WINDOWS) -> Forecast | None:
    """Return the forecast of a run with settings that fit in `config.memory`; None if there is no limit.

    `windows` is the number of windows of the evaluation. Of several processes the first one decides, and also if there
    is no limit: whether they divide the weights. Logs a warning if the settings are not those given. Raises
    `PermpruneError` if none fit.
    """
    alone = config.shard is False or (config.shard is None and distributed.world() == 1)
    if config.memory is None and alone and config.place == "none":
        return None

    def decide() -> Forecast:
        model = read_skeleton(name, task=config.task, trust_remote_code=config.trust_remote_code)
        fitting = Fitting(
            name,
            model,
            outline_model(model, config),
            this_machine(),
            windows=windows,
            stored=model.dtype,
            processes=distributed.world(),
            size=read_size(name, model, trust_remote_code=config.trust_remote_code),
        )
        fitting.require_offloadable(config)
        if config.memory is not None:
            return fitting.within(config, config.memory)
        return forecast_held(fitting, config) if alone else fitting.together(config)

    chosen = distributed.on_first(decide)
    if chosen.advice:
        log.warning("%s", chosen.advice)
    elif (count := chosen.processes) > 1:
        log.info("each of the %d processes holds the whole model, and runs a share of the batches", count)
    return chosen


def crowding(name: str, model: PreTrainedModel, config: PruneConfig, **settings: Any) -> str:
    """Return a warning if a run without a limit needs more memory than is free, or else "".

    `model` is on the meta device, and the `settings` are fields of `Subject`. Of a model that does not run without
    numbers nothing is known.
    """
    free = this_machine().memory or psutil.virtual_memory().available
    if ROOMY * weight_bytes(model, torch.float32) + LEAST < free:
        return ""
    try:
        fitting = Fitting(name, model, outline_model(model, config), this_machine(), **settings)
        return fitting.advised(config, free).advice
    except PermpruneError:
        raise
    except Exception as error:  # a model's own code can raise any type
        log.info("the memory is not known: %s", first_line(error))
        return ""


@dataclass(frozen=True)
class Fitting(Subject):
    """Forecasts of runs with more or less lean settings."""

    def require_offloadable(self, config: PruneConfig) -> None:
        """Raise `PermpruneError` if the settings offload a model that has to be in memory."""
        if config.place != "none" and (whole := self._whole(config)):
            raise PermpruneError(f"{whole} in memory: leave offload out")

    def together(self, config: PruneConfig) -> Forecast:
        """Return the forecast of the run of several processes with the settings given.

        They divide the weights if `config.shard` says so, or if the whole model does not fit in the memory of each.
        Raises `PermpruneError` if they are to divide them and cannot.
        """
        fault = self._undivided(config)
        if config.shard:
            if fault:
                raise PermpruneError(fault)
            return replace(forecast_held(self, config, self.processes), advice=self._dividing(""))
        whole = forecast_held(self, config)
        if config.shard is False or whole.tensors <= self._memory(whole):
            return whole
        if fault:
            return replace(whole, advice=f"each process holds the whole model, {gib(whole.tensors)}, because {fault}")
        needed = f"the whole model would take about {gib(whole.tensors)} in each process: "
        return replace(forecast_held(self, config, self.processes), advice=self._dividing(needed))

    def within(self, config: PruneConfig, memory: int) -> Forecast:
        """Return the forecast of the run with the settings given, or with the first leaner ones that fit.

        Leaner settings in turn are fewer windows in a batch, activations that are computed again, tensors that are
        offloaded, activations in bf16; and the same with weights that the processes divide, which do not offload.
        Raises `PermpruneError` if none fits in `memory` bytes.
        """
        fault = self._undivided(config)
        if config.shard and fault:
            raise PermpruneError(fault)
        fitting, least = self._leaner(config, 1, memory)
        if fitting is not None and not config.shard:
            options = _options(config, fitting.config)
            return replace(fitting, advice=f"to stay within the memory limit: {options}" if options else "")
        if fitting is None and least.tensors <= memory:
            raise PermpruneError(self._full_host(least))
        needed = f"about {gib(least.tensors, up=True)}{_with(config, least.config)}"
        if not fault and config.shard is not False:
            fitting, least = self._leaner(config, self.processes, memory)
            if fitting is not None:
                whole = "" if config.shard else f"the whole model would take {needed} in each process: "
                return replace(fitting, advice=self._dividing(whole) + _with(config, fitting.config))
            each = f"about {gib(least.tensors, up=True)} in each process"
            needed = f"{each}, where they divide it{_with(config, least.config)}"
        if config.shard:
            raise PermpruneError(f"the divided model takes {needed}: raise --memory to that, or start more processes")
        if whole := self._whole(config):
            raise PermpruneError(f"{whole} in memory, which takes {needed}: raise --memory to that")
        raise PermpruneError(f"the model takes {needed}: raise --memory to that{self._smaller(config, memory)}")

    def advised(self, config: PruneConfig, free: int | None = None) -> Forecast:
        """Return the forecast of the run with the settings given.

        If it does not fit in the memory of the machine, or in the bytes that are `free`, `advice` says what would.
        """
        given = forecast_held(self, config)
        memory = self._memory(given) if free is None else min(free, self._memory(given))
        if given.tensors <= memory:
            return given
        fitting, least = self._leaner(config, 1, memory)
        place = f"{self.machine.name} has {gib(memory)} for tensors, which is too little"
        if fitting is not None:
            return replace(given, advice=f"{place}: {gib(fitting.tensors)}{_with(config, fitting.config)} would fit")
        if least.tensors <= memory:
            return replace(given, advice=self._full_host(least))
        return replace(given, advice=f"{place}; no settings take less than {gib(least.tensors)}")

    def _full_host(self, offloaded: Forecast) -> str:
        held, memory = gib(offloaded.host), gib(psutil.virtual_memory().total)
        return f"the host has {memory}, and a run that offloads to it takes {held} of that: give --set offload=disk"

    def _smaller(self, config: PruneConfig, memory: int) -> str:
        """What would let a model of text fit in `memory` bytes beside a higher limit; empty if nothing is known."""
        if self.processes > 1:
            return ", or start one process, which offloads"
        gathered = config.replace(mode="gather")
        other = replace(self, outline=outline_model(self.model, gathered))
        return ", or take --mode gather" if other._leaner(gathered, 1, memory)[0] else ""

    def _leaner(self, config: PruneConfig, shards: int, memory: int) -> tuple[Forecast | None, Forecast]:
        """Return the first run that fits in `memory` bytes, if any, and the one that takes least.

        The runs are those with the settings given, and with leaner and leaner ones. Of those that offload to the host,
        the fastest one counts: what leaner settings spare on the device need not travel.
        """
        given, ladder = forecast_held(self, config, shards), list(_leaner(config, self.machine))
        if self.processes > 1 or self._whole(config):
            ladder = [settings.replace(offload=config.offload) for settings in ladder]
        leanest = [
            forecast_held(self, settings, shards) for settings in ladder if settings.batch == 1 and settings.recompute
        ]
        least = min([given, *leanest], key=lambda fitting: fitting.tensors)
        runs = chain([given], (forecast_held(self, settings, shards) for settings in ladder))
        fitting = (one for one in runs if one.tensors <= memory and self._fits_host(one))
        first = next(fitting, None) if least.tensors <= memory else None
        if first is not None and first.config.place == "host":
            others = takewhile(lambda one: one.config.place == "host", fitting)
            first = min([first, *others], key=lambda one: sum(time or 0.0 for time in one.seconds.values()))
        return first, least

    def _fits_host(self, offloaded: Forecast) -> bool:
        """Whether what a run offloads to the host fits in the memory of this machine, if that runs it."""
        elsewhere = self.machine.sheet is not None or offloaded.config.place != "host"
        return elsewhere or offloaded.host <= psutil.virtual_memory().total

    def _memory(self, given: Forecast) -> int:
        """The bytes for the tensors of one process: those of its device, or its share of those of the host."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        return self.machine.memory or psutil.virtual_memory().total // processes - given.program

    def _dividing(self, why: str) -> str:
        return f"{why}the {self.processes} processes divide the rows of the weights"

    def _undivided(self, config: PruneConfig) -> str:
        """Why processes cannot divide the weights of this model, or with these settings; empty if they can."""
        recipe = config.recipe
        if self.processes == 1:
            return "one process has nothing to divide: start several with torchrun, or leave shard out"
        if whole := self._whole(config):
            return f"{whole} by processes that hold all of it: leave shard out"
        if not recipe.order.divides_rows:
            able = ", ".join(name for name, other in PERMUTERS.items() if other().divides_rows)
            return (
                f"permuter {describe(recipe.order)} needs all rows of a layer: choose one of {able}, or --effort order"
            )
        if recipe.changes:
            return "an update and training need all rows of a layer: leave both out, or --effort order"
        try:
            require_divisible(self.outline.layers, self.processes)
        except PermpruneError as error:
            return str(error)
        return ""

    def _whole(self, config: PruneConfig) -> str:
        """Why this model or pattern needs the whole model in memory, whatever the method; empty if it does not."""
        if (kind := kind_of(self.model)) != "text":
            return f"models of {kind} can only be pruned"
        if (Path(resolve_model(self.name)) / GATHERED).exists():
            return "a model that reorders channels at run time can only be pruned"
        return "a mix of patterns needs all layers" if config.pattern == MIXED else ""


def _leaner(config: PruneConfig, machine: Machine) -> Iterator[PruneConfig]:
    """Yield settings that need less and less memory, those that cost least first.

    What is offloaded is read for each batch: there, as many windows as fit cost least.
    """
    batches = [config.batch >> halved for halved in range(config.batch.bit_length())]
    places: tuple[str, ...] = (config.offload,)
    if config.offload == "none":
        yield from (config.replace(batch=batch) for batch in batches[1:])
        if not config.recompute:
            yield config.replace(batch=1, recompute=True)
        places = ("disk",) if machine.device.type == "cpu" else ("host", "disk")
    for place in places:
        yield from (config.replace(batch=batch, recompute=True, offload=place) for batch in batches)
    if config.precision == "auto" and machine.dtype == torch.float32:
        yield config.replace(batch=1, recompute=True, offload=places[-1], precision="bf16")


def _options(given: PruneConfig, chosen: PruneConfig) -> str:
    """The options that lead from one config to another."""
    options = {
        "batch": chosen.batch, "recompute": "true", "precision": chosen.precision, "offload": chosen.offload,
    }  # fmt: skip
    changed = [name for name in options if getattr(chosen, name) != getattr(given, name)]
    return " ".join(f"--set {name}={options[name]}" for name in changed)


def _with(given: PruneConfig, chosen: PruneConfig) -> str:
    options = _options(given, chosen)
    return f" with {options}" if options else ""
