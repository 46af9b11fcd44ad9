"""The forecast of a run: memory by stage and part, disk space, and time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from permprune.config import PruneConfig
from permprune.forecasts.machine import Machine
from permprune.forecasts.resources import Stage
from permprune.system.shelf import Place
from permprune.updates.methods import NoUpdate


@dataclass(frozen=True)
class Forecast:
    """The memory, disk space and time that a run takes.

    `stages` are in the order of the run. `disk` are the bytes on disk, by what is written. `program` are the bytes
    of the Python process without tensors. Bytes of memory are those of one process, of `processes`, and bytes on
    disk those of all; `shards` of them divide the rows of the weights. `room` are the bytes for tensors at rest on
    the device and the host, and those of the device that are reserved for updates (`Room`). `assumed` are the
    assumptions, one sentence each. `advice` says how the settings differ from those given, or which would fit.
    """

    config: PruneConfig
    machine: Machine
    stages: tuple[Stage, ...]
    disk: dict[str, int]
    program: int
    processes: int = 1
    shards: int = 1
    assumed: tuple[str, ...] = ()
    advice: str = ""
    room: tuple[float, float, float] = (0.0, math.inf, 0.0)

    def peak(self, place: Place | None = None) -> Stage:
        """The stage that holds the most bytes, at one place or in all."""
        return max(self.stages, key=lambda stage: stage.bytes(place))

    @property
    def tensors(self) -> int:
        """The peak bytes of tensors in the memory that `PruneConfig.memory` limits: of the device, or of the host."""
        return self.peak(self._limited).bytes(self._limited)

    @property
    def host(self) -> int:
        """The peak bytes of the process in the memory of the host."""
        place: Place | None = None if self._limited is None else "host"
        return self.program + self.peak(place).bytes(place)

    @property
    def device(self) -> int | None:
        """The peak bytes in the memory of the device; None if the CPU computes."""
        return None if self._limited is None else self.tensors

    @cached_property
    def seconds(self) -> dict[str, float | None]:
        """The time of each stage; None where it is not known.

        If the rounds of a search need more than their share of a time limit, all its stages are shortened alike.
        Each training takes what is left of the limit, unless its steps need less.
        """
        times = {stage.name: None if stage.work is None else self.machine.seconds(stage.work) for stage in self.stages}
        if self.config.minutes is None:
            return times
        limit, share = 60 * self.config.minutes, self.config.recipe.rounds_share
        rounds = {stage.name: times[stage.name] for stage in self.stages if stage.limited and not stage.last}
        known = sum(filter(None, rounds.values()))
        searched = min(known, limit * share)
        times |= {name: own and own * searched / max(known, 1e-9) for name, own in rounds.items()}
        for stage in self.stages:
            if stage.last:
                needed, left = times[stage.name], limit - searched
                times[stage.name] = taken = left if needed is None else min(needed, left)
                searched += taken
        return times

    @property
    def changes(self) -> str | None:
        """What changes the weights that are kept: "training", the name of an update, or None."""
        recipe = self.config.recipe
        if recipe.train.steps:
            return "training"
        return None if isinstance(recipe.update, NoUpdate) else recipe.update.name

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON values; bytes and seconds."""
        return {
            "machine": self.machine.name,
            "recipe": list(self.config.recipe.lines),
            "settings": self.config.to_json(),
            "processes": self.processes,
            "shards": self.shards,
            "changes": self.changes,
            "host": self.host,
            "device": self.device,
            "program": self.program,
            "disk": self.disk,
            "stages": [
                {
                    "name": stage.name,
                    "bytes": stage.bytes(),
                    "parts": [asdict(part) for part in stage.parts],
                    "seconds": self.seconds[stage.name],
                }
                for stage in self.stages
            ],
            "assumed": list(self.assumed),
            "advice": self.advice,
        }

    @property
    def _limited(self) -> Place | None:
        return None if self.machine.device.type == "cpu" else "device"
