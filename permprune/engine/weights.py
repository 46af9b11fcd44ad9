"""Where the weights of a run are: what a session asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.mix import Mix
from permprune.checkpoints.offload import StoredWeights, load_written_offloaded, write_offloaded
from permprune.engine.pruned import Pruned
from permprune.models.processors import Processor
from permprune.permuters.base import Permuter, Run, Solution
from permprune.plan import Plan
from permprune.pruning.masked import LayerMeasure
from permprune.system.shelf import Shelf


class Weights(ABC):
    """The weights of a model that is pruned: in memory, divided among processes, or on disk.

    `model` runs with the weights that were shown last. `stored` is the type in which the checkpoint stores them, and
    `seconds` the time that the calibration took. `unanswering` says why the model cannot answer examples one token
    after the other; it is empty if it can. `mixed` is the choice of the patterns of a mix.
    """

    unanswering: ClassVar[str] = ""

    model: PreTrainedModel
    processor: Processor | None
    stored: torch.dtype
    plan: Plan
    seconds: float
    mixed: Mix | None = None

    @abstractmethod
    def dense(self) -> AbstractContextManager[None]:
        """A context in which the model runs with its dense weights."""

    @abstractmethod
    def natural(self) -> list[LayerMeasure]:
        """Show the pruned weights in natural order, with the update of the config; returns the layers' measures."""

    @abstractmethod
    def search(self, method: Permuter, run: Run) -> Solution:
        """Find orders with a method, and show the weights that they prune. Raises `PermpruneError`."""

    @abstractmethod
    def update(self) -> None:
        """Apply the weight update of the config to the weights shown. Raises `PermpruneError`."""

    @abstractmethod
    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        """Put the weights of a solution, which has to be the one shown, in stored order.

        `natural` are the measures in natural order. Nothing else can be shown afterwards.
        """

    @abstractmethod
    def write(self, folder: Path, pruned: Pruned) -> None:
        """Write the weights in stored order and the processor to a folder. Raises `PermpruneError`."""

    @abstractmethod
    def load(self, folder: Path) -> PreTrainedModel:
        """Load what was written to a folder, to check it; nothing can be written afterwards."""

    def restore(self) -> None:  # noqa: B027
        """Let the model run with its dense weights; nothing else can be shown afterwards. By default nothing."""

    def served(self) -> AbstractContextManager[None]:
        """A context of the first process in which the others `serve` it while it writes; by default nothing."""
        return nullcontext()

    def serve(self) -> None:  # noqa: B027
        """Help the first process to write, until it has ended; by default nothing."""


class Offloaded(Weights):
    """Weights of which one at a time is in memory when they are written, or loaded to check what was written.

    `weights` are those to write. At most half of `memory` bytes of them are held at a time. What is loaded may need
    temporary files in the folder `scratch`.
    """

    weights: StoredWeights
    memory: int
    scratch: Path

    @torch.no_grad()
    def write(self, folder: Path, pruned: Pruned) -> None:
        write_offloaded(
            pruned.model,
            self.processor,
            self.weights,
            dtype=self.stored,
            gathered=bool(pruned.gathers),
            folder=folder,
            memory=self.memory,
        )

    def load(self, folder: Path) -> PreTrainedModel:
        return load_written_offloaded(self.model, folder, self.scratch)


@torch.no_grad()
def round_weights(weights: Iterable[Tensor], stored: torch.dtype) -> None:
    """Round weights in place to the type in which they will be stored, so that what is measured is what is written."""
    for weight in weights:
        if weight.is_floating_point():
            weight.copy_(weight.to(stored))


def round_shelved(weights: Shelf, stored: torch.dtype) -> None:
    """The same for weights on a shelf."""
    for name in weights:
        weight = weights[name]
        round_weights([weight], stored)
        weights[name] = weight
