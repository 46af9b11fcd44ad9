"""The bytes that a run on the simulated device holds in each stage of its forecast, there and on the host."""

from __future__ import annotations

import functools
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

import permprune.plan
from permprune.coupling.space import Coupling
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.machine import Machine, this_machine
from permprune.kernels.search.placement import add_placement_cost

from .held_bytes import Held
from .simulated_device import SIMULATED, Allocated, SimulatedTensor, allocated, simulated_device

BEGUN = {
    "calibrate": ("engine.held.measure", "engine.sharded.measure"),
    "ria": ("permuters.kept.RIAPermuter.search",),
    "gradients": ("pruning.network.PrunedNetwork.gradients",),
    "proposals": ("permuters.trust_region.TrustRegion.proposals", "pruning.masked.MaskedLayers.slopes_along"),
    "accept": ("pruning.network.PrunedNetwork.loss",),
    "update": ("updates.base.LayerUpdate.run",),
    "blocks": ("recipe.trained_blocks",),
    "training": ("recipe.train_weights",),
    "evaluate": ("engine.session.Session._measurement", "pruning.masked.MaskedLayers.measures"),
    "write": ("engine.held.Held.finish", "engine.sharded.Sharded.finish", "jobs.prune.write_pruned_weights"),
}
"""What begins a stage of a forecast, by the end of its name; what follows belongs to it, too."""


class Stages:
    """The most bytes of the device, and of its host, in each stage that ran."""

    def __init__(self, device: Allocated, host: Held) -> None:
        self.device, self.host, self.base = device, host, device.now
        self.peaks = defaultdict[str, tuple[int, int]](lambda: (0, 0))
        self.at, self.depth = "load", 0

    def enter(self, stage: str) -> str:
        """End the present stage, and begin another; returns the former."""
        found = self.device.peak - self.base, self.host.peak
        self.peaks[self.at] = max(found[0], self.peaks[self.at][0]), max(found[1], self.peaks[self.at][1])
        self.device.begin()
        self.host.peak = self.host.now
        before, self.at = self.at, stage
        return before

    def during(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part of a stage; if it ends inside of another, that goes on."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(stage)
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth:
                    self.enter(before)

        return run

    def beside(self, forecast: Forecast) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """The peaks of each stage, on the device and on the host, and beside them those that were forecast."""
        told = defaultdict[str, tuple[int, int]](lambda: (0, 0))
        for stage in forecast.stages:
            name, own = stage.name.rpartition(": ")[2], (stage.bytes("device"), stage.bytes("host"))
            told[name] = max(own[0], told[name][0]), max(own[1], told[name][1])
        return {name: (peaks, told[name]) for name, peaks in self.peaks.items()}


@contextmanager
def on_simulated_device(machine: Machine) -> Iterator[pytest.MonkeyPatch]:
    """A context in which models are read onto the simulated device, and forecasts are those of `machine`."""
    with pytest.MonkeyPatch.context() as patch, simulated_device():
        trace_on_cpu(patch)
        read_there(patch)
        plan_for(patch, machine)
        for module in ("kept", "quadratic"):  # in native code, since it takes minutes
            patch.setattr(f"permprune.permuters.{module}.add_placement_cost", _on_values(add_placement_cost))
        yield patch


def _on_values(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(SimulatedTensor, lambda tensor: tensor.values, (args, kwargs))
        return function(*args, **kwargs)

    return run


def trace_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """`torch.export` does not know the simulated device: a copy of the model on the CPU is traced."""
    discover = permprune.plan.discover

    def on_cpu(model: PreTrainedModel, example: dict[str, Tensor]) -> Coupling:
        tensors = (*model.parameters(), *model.buffers(), *example.values())
        devices = {tensor.device for tensor in tensors if not tensor.is_meta}
        assert len(devices) <= 1
        if not devices:
            return discover(model, example)
        inputs = {name: tensor.cpu() for name, tensor in example.items()}
        with _disable_current_modes():  # which would count the copy
            return discover(type(model)(model.config), inputs)

    for module in ("plan", "jobs.student"):
        patch.setattr(f"permprune.{module}.discover", on_cpu)


def read_there(patch: pytest.MonkeyPatch) -> None:
    """Let models be read onto the simulated device."""
    this_machine()  # which imports `best_device` when it is first called: the one that it keeps is not the patched one
    for module in ("system.device", "checkpoints.io", "checkpoints.offload"):
        patch.setattr(f"permprune.{module}.best_device", lambda: SIMULATED)


def plan_for(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Let forecasts be those of a machine."""
    for module, name in (("fitting", "machine_named"), ("fitting", "this_machine"), ("run", "this_machine")):
        patch.setattr(f"permprune.forecasts.{module}.{name}", lambda *_: machine)


@contextmanager
def counted(computed: float = math.inf) -> Iterator[Stages]:
    """A context that counts the bytes of a run by stage; it keeps all that it tries, as its forecast assumes.

    `computed` is as in `Allocated`.
    """
    gc.collect()  # what an earlier run left, which would be freed during this one
    with pytest.MonkeyPatch.context() as patch, allocated(computed=computed) as device, Held() as host:
        patch.setattr("permprune.recipe.TOLERANCE", -math.inf)
        stages = Stages(device, host)
        for stage, functions in BEGUN.items():
            for name in functions:
                target = f"permprune.{name}"
                patch.setattr(target, stages.during(stage, resolve_name(target)))
        yield stages
        stages.enter("load")
