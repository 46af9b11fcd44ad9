"""Settings of a run that fit in a memory limit: those given, leaner ones, or a run layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from permprune.checkpoints.io import GATHERED
from permprune.checkpoints.offload import read_shapes, read_skeleton
from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.evaluation.size import weight_bytes
from permprune.jobs.forecast import (
    EVALUATED,
    EVALUATION_BATCH,
    Forecast,
    forecast_held,
    forward_operations,
    program_bytes,
)
from permprune.jobs.machine import Machine, machine_named, this_machine
from permprune.jobs.streaming import offloaded_bytes, streamed_bytes, streamed_masks_bytes
from permprune.models.modality import kind_of
from permprune.pattern import MIXED
from permprune.permuters.base import LocalPermuter
from permprune.permuters.registry import PERMUTERS, permuter
from permprune.plan import outline_model
from permprune.pruning.outline import Outline
from permprune.saliency.registry import saliency
from permprune.system import distributed
from permprune.system.out_of_memory import memory_reported
from permprune.system.progress import log
from permprune.system.resources import Held, Stage, Work, gib
from permprune.updates.none import NoUpdate
from permprune.updates.registry import update
from permprune.zoo.models import resolve_model

WINDOWS = 24
"""Windows of the evaluation, by default."""


@memory_reported()
def forecast(
    name: str, config: PruneConfig | None = None, *, windows: int = WINDOWS, gpu: str | None = None
) -> Forecast:
    """Forecast a run of `prune_to_folder`: memory by stage and part, disk space and time.

    `name` is a zoo name, a hub id, or a folder, of which only config.json is read. `windows` is the number of windows
    of the evaluation. `gpu` is the name of a GPU (`permprune.jobs.machine.GPUS`), by default that of this machine, or
    its CPU. With `config.memory`, the settings are those that `prune_to_folder` would choose; without it, `advice`
    names settings that fit in the memory of the machine, if those given do not. Raises `PermpruneError`, also if no
    settings fit in `config.memory`.
    """
    config = config or PruneConfig()
    model, stored = read_shapes(name, trust_remote_code=config.trust_remote_code)
    fitting = Fitting(name, model, outline_model(model, config), machine_named(gpu), windows=windows, stored=stored)
    return fitting.advised(config) if config.memory is None else fitting.within(config, config.memory)


def fit_memory(name: str, config: PruneConfig) -> Forecast | None:
    """Return the forecast of a run with settings that fit in `config.memory`; None if there is no limit.

    Logs a warning if the settings are not those given. Raises `PermpruneError` if none fit.
    """
    if config.memory is None:
        return None
    model = read_skeleton(name, trust_remote_code=config.trust_remote_code)
    outline = outline_model(model, config)
    found = Fitting(name, model, outline, this_machine(), stored=model.dtype).within(config, config.memory)
    if found.advice:
        log.warning("%s", found.advice)
    return found


@dataclass(frozen=True)
class Fitting:
    """Forecasts of runs with more or less lean settings, of a model on the meta device.

    `windows` is the number of windows of the evaluation, and `stored` the type in which the weights are stored.
    """

    name: str
    model: PreTrainedModel
    outline: Outline
    machine: Machine
    stored: torch.dtype
    windows: int = WINDOWS

    def held(self, config: PruneConfig) -> Forecast:
        """Forecast a run that holds the whole model in memory."""
        return forecast_held(self.model, config, self.outline, self.machine, windows=self.windows, stored=self.stored)

    def within(self, config: PruneConfig, memory: int) -> Forecast:
        """Return the forecast of the run with the settings given, or with the first leaner ones that fit.

        Leaner settings in turn are fewer windows in a batch, activations that are computed again, activations in bf16,
        and, with methods for which that is possible, a run layer by layer. Raises `PermpruneError` if none fits in
        `memory` bytes.
        """
        found, least = self._leaner(config, self.held(config), memory)
        if found is not None:
            options = _options(config, found.config)
            return replace(found, advice=f"to stay within the memory limit: {options}" if options else "")
        needed = f"about {gib(least.tensors)}{_with(config, least.config)}"
        if whole := self._whole(config):
            raise PermpruneError(f"{whole} in memory, which takes {needed}: raise --memory to that")
        streamed = self._streamed(config)
        if what := _needs_network(config):
            smaller = f", which takes about {gib(streamed.tensors)}" if streamed.tensors < least.tensors else ""
            raise PermpruneError(
                f"{what} needs the whole network in memory, which takes {needed}: raise --memory to that, "
                f"or take a permuter that works layer by layer ({_local_permuters()}) and no update{smaller}"
            )
        if streamed.tensors > memory:
            raise PermpruneError(
                f"even layer by layer this model takes about {gib(streamed.tensors)}: raise --memory to that, "
                "or shorten --length"
            )
        how = f"the whole model would take {needed}: it is pruned layer by layer, without the network's loss"
        return replace(streamed, advice=how)

    def advised(self, config: PruneConfig) -> Forecast:
        """Return the forecast of the run with the settings given.

        If it does not fit in the memory of the machine, `advice` says what would.
        """
        given = self.held(config)
        memory = self.machine.memory or psutil.virtual_memory().total - given.program
        if given.tensors <= memory:
            return given
        found, least = self._leaner(config, given, memory)
        place = f"{self.machine.name} has {gib(memory)} for tensors, which is too little"
        if found is not None:
            return replace(given, advice=f"{place}: {gib(found.tensors)}{_with(config, found.config)} would fit")
        if not self._whole(config) and (streamed := self._streamed(config)).tensors <= memory:
            local = f" and a permuter that works layer by layer ({_local_permuters()})"
            how = f"--memory {memory // 2**20}MiB{local if _needs_network(config) else ''}"
            return replace(given, advice=f"{place}: {gib(streamed.tensors)} with {how} would fit")
        return replace(given, advice=f"{place}; no settings take less than {gib(least.tensors)}")

    def _leaner(self, config: PruneConfig, given: Forecast, memory: int) -> tuple[Forecast | None, Forecast]:
        """Return the first run that fits in `memory` bytes, if any, and the one that takes least.

        The runs are the one with the settings given, and then leaner and leaner ones.
        """
        ladder = list(_leaner(config, self.machine))
        leanest = [self.held(settings) for settings in ladder if settings.batch == 1 and settings.recompute]
        least = min([given, *leanest], key=lambda found: found.tensors)
        if given.tensors <= memory or least.tensors > memory:
            return (given if given.tensors <= memory else None), least
        runs = (found for settings in ladder if (found := self.held(settings)).tensors <= memory)
        return next(runs), least

    def _whole(self, config: PruneConfig) -> str:
        """Why this model or pattern needs the whole model in memory, whatever the method; empty if it does not."""
        if (kind := kind_of(self.model)) != "text":
            return f"models of {kind} can only be pruned"
        if (Path(resolve_model(self.name)) / GATHERED).exists():
            return "a model that reorders channels at run time can only be pruned"
        return "a mix of patterns needs all layers" if config.pattern == MIXED else ""

    def _streamed(self, config: PruneConfig) -> Forecast:
        """Forecast a run that reads the model layer by layer; the time of its search is not known."""
        model, outline, windows = self.model, self.outline, self.windows
        tokens, own = config.shares(config.samples)[0] * config.length, weight_bytes(model, self.stored)
        needed = streamed_bytes(model, outline, metric=saliency(config.saliency), tokens=tokens, length=config.length)
        part, forward = Held("largest part of the model", needed), forward_operations(model)
        batches = -(-windows // EVALUATION_BATCH)
        evaluating = Work(products_fp32=windows * config.length * forward, stored=batches * own) * EVALUATED
        return Forecast(
            config=config,
            machine=self.machine,
            stages=(
                Stage("calibrate", (part,), Work(products=tokens * forward, stored=own)),
                Stage(f"{permuter(config.permute).name}, layer by layer", (part,), None),
                Stage("evaluate", (part,), evaluating),
                Stage("write", (part,), Work(stored=2 * own)),
            ),
            disk={
                "checkpoint": own,
                "masks": distributed.world() * streamed_masks_bytes(outline),
                "experts as fused": distributed.world() * offloaded_bytes(outline, self.stored),
            },
            program=program_bytes(),
            streamed=True,
        )


def _leaner(config: PruneConfig, machine: Machine) -> Iterator[PruneConfig]:
    """Yield settings that need less and less memory, those that cost least first."""
    while config.batch > 1:
        config = config.replace(batch=config.batch // 2)
        yield config
    if not config.recompute:
        config = config.replace(recompute=True)
        yield config
    if config.precision == "auto" and machine.dtype == torch.float32:
        yield config.replace(precision="bf16")


def _options(given: PruneConfig, chosen: PruneConfig) -> str:
    """The options that lead from one config to another."""
    options = []
    if chosen.batch != given.batch:
        options.append(f"--batch {chosen.batch}")
    if chosen.recompute != given.recompute:
        options.append("--recompute")
    if chosen.precision != given.precision:
        options.append(f"--precision {chosen.precision}")
    return " ".join(options)


def _with(given: PruneConfig, chosen: PruneConfig) -> str:
    options = _options(given, chosen)
    return f" with {options}" if options else ""


def _needs_network(config: PruneConfig) -> str:
    """The method of a config that needs the whole network, if there is one."""
    method, change = permuter(config.permute), update(config.update)
    if not isinstance(method, LocalPermuter):
        return f"permuter {method.name}"
    return "" if isinstance(change, NoUpdate) else f"update {change.name}"


def _local_permuters() -> str:
    """The names of the permuters that work layer by layer."""
    return ", ".join(name for name, other in PERMUTERS.items() if issubclass(other, LocalPermuter))
