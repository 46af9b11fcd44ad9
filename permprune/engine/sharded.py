"""A model of whose weights each process holds some rows (`permprune.models.row_shards`), or one process one block."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.offload import (
    CollectedWeights,
    StoredWeights,
    attach,
    load_at_rest,
    load_written_offloaded,
    read_offloaded,
    write_offloaded,
)
from permprune.checkpoints.probe import make_probe
from permprune.config import PruneConfig
from permprune.engine.held import Held, measure
from permprune.engine.pruned import Pruned, beside_natural, stored_form, stored_order
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.costs import state_bytes
from permprune.forecasts.offloading import FILES
from permprune.models.forward import short_inputs
from permprune.models.layers import require_finite, values_of
from permprune.models.narrow_weights import NarrowWeights
from permprune.models.row_shards import load_rows
from permprune.permuters.base import Solution
from permprune.plan import Plan, calibration_examples, plan_run
from permprune.pruning.masked import LayerMeasure
from permprune.system import distributed
from permprune.system.files import WorkFolder, require_space
from permprune.system.memory import release_freed_memory
from permprune.system.shelf import Place, Room, Shelf


class Sharded(Held):
    """A model whose weights the processes read, prune and write in parts; inside `distributed.dividing_rows`.

    No process holds all weights: each reads its rows from the checkpoint, and to write the model, one file of weights
    at a time is collected; there are about twice as many files as processes. Raises `PermpruneError`, on all processes,
    for a checkpoint or data that cannot be used.
    """

    weights: CollectedWeights
    unanswering = "the weights were divided among processes"

    def __init__(
        self,
        name: str,
        config: PruneConfig,
        work: WorkFolder,
        planned: Callable[[PreTrainedModel, Plan], object] = lambda *_: None,
        room: Room | None = None,
    ) -> None:
        started, folder = time.monotonic(), work.scratch / f"rank-{distributed.rank()}"
        model, processor, stored, weights = read_offloaded(
            name, folder, task=config.task, trust_remote_code=config.trust_remote_code
        )
        self.whole = copy.deepcopy(model)  # without weights: for the record, and to write
        examples = calibration_examples(model, processor, config)
        plan = plan_run(model, config, examples=examples, weights=weights.stored, partial=work.path)
        size, states = weight_bytes(self.whole, stored), state_bytes(config.recipe, plan.outline)
        distributed.on_first(lambda: require_space(work.out, size + states))

        planned(self.whole, plan)
        self.shelf, fisher = self.shelf_of(config, work, room), config.recipe.order.uses_fisher

        def load() -> NarrowWeights | None:
            held = self.load_weights(model, weights, {layer.parameter for layer in plan.outline.layers})
            for layer in plan.outline.layers:
                require_finite(layer)
            return held

        held = distributed.on_all(load)
        super().__init__(measure(plan, model, started, held, shelf=self.shelf, fisher=fisher), processor)
        self.stored, self.scratch, self.memory = stored, work.scratch / "written", -(-size // self.files())
        lengths = {name: len(parameter) for name, parameter in self.whole.named_parameters()}

        def rows_to_write(name: str) -> tuple[Tensor, int]:
            rows = values_of(model.get_parameter(name)).to(stored, copy=True)
            for layer in self.network.by_parameter.get(name, ()):
                layer.part_of(rows).copy_(self.network.shown[layer.name])
            return rows, lengths[name]

        self.weights = CollectedWeights(lengths, weights.canonical, rows_to_write)
        attach(self.whole, self.weights)

    def load_weights(
        self, model: PreTrainedModel, weights: StoredWeights, pruned: Collection[str]
    ) -> NarrowWeights | None:
        """Give a model on the meta device the weights that this process holds; `pruned` are parameters to prune.

        Returns those that are held in bf16, if they were read so.
        """
        load_rows(model, weights.rows)
        return None

    def shelf_of(self, config: PruneConfig, work: WorkFolder, room: Room | None) -> Shelf:
        """Where the other tensors of the run rest, and the room that is left for them."""
        return Shelf()

    def files(self) -> int:
        """Half the number of files of weights that are written."""
        return distributed.shards()

    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        """Return the pruned model, without its weights, which `write` collects."""
        release_freed_memory()  # of the search: the first process collects whole files
        measures = beside_natural(self.network.measures(), natural)
        probe = make_probe(self.model, short_inputs(self.model, self.plan.run.held_out))
        pruned = stored_form(self.plan, self.whole, solution, layers=measures, probe=probe)
        self.weights.edit = stored_order(self.plan, pruned)
        return pruned

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

    def served(self) -> AbstractContextManager[None]:
        return self.weights.served()

    def serve(self) -> None:
        self.weights.serve()


class Offloading(Sharded):
    """A model whose weights are at rest while their modules do not run, and whose other tensors rest on shelves.

    Weights on the disk are read from the checkpoint. Raises `PermpruneError` for a checkpoint or data that cannot be
    used, and if the disk is full.
    """

    unanswering = "the weights were offloaded"

    def load_weights(self, model: PreTrainedModel, weights: StoredWeights, pruned: Collection[str]) -> NarrowWeights:
        load_at_rest(model, weights, pruned, held=self.shelf.place == "host")
        return NarrowWeights.as_read(model)

    def shelf_of(self, config: PruneConfig, work: WorkFolder, room: Room | None) -> Shelf:
        return Shelf(cast(Place, config.place), work.scratch, room=room)

    def files(self) -> int:
        return FILES
