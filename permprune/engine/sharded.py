"""A model of whose weights each process holds some rows (`permprune.models.row_shards`)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.offload import (
    CollectedWeights,
    attach,
    load_written_offloaded,
    read_offloaded,
    write_offloaded,
)
from permprune.checkpoints.probe import make_probe
from permprune.config import PruneConfig
from permprune.engine.held import Held, measure
from permprune.engine.pruned import Pruned, beside_natural, new_gathers
from permprune.engine.streamed import stored_order
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.costs import state_bytes
from permprune.models.forward import short_inputs
from permprune.models.layers import require_finite
from permprune.models.row_shards import load_rows
from permprune.permuters.base import Solution
from permprune.permuters.registry import permuter
from permprune.plan import calibration_examples, plan_run
from permprune.pruning.masked import LayerMeasure
from permprune.pruning.stored import fold_tables, reordered_outputs
from permprune.system import distributed
from permprune.system.files import WorkFolder, require_space
from permprune.system.memory import release_freed_memory


class Sharded(Held):
    """A model whose weights the processes read, prune and write in parts; inside `distributed.dividing_rows`.

    No process holds all weights: each reads its rows from the checkpoint, and to write the model, one file of weights
    at a time is collected. Raises `PermpruneError`, on all processes, for a checkpoint or data that cannot be used.
    """

    def __init__(self, name: str, config: PruneConfig, work: WorkFolder) -> None:
        started, folder = time.monotonic(), work.scratch / f"rank-{distributed.rank()}"
        model, processor, stored, weights = read_offloaded(name, folder, trust_remote_code=config.trust_remote_code)
        self.whole = copy.deepcopy(model)  # without weights: for the record, and to write
        examples = calibration_examples(model, processor, config)
        plan = plan_run(model, config, examples=examples, weights=weights.stored, partial=work.path)
        states = state_bytes(permuter(config.permute), plan.outline)
        distributed.on_first(lambda: require_space(work.out, weight_bytes(self.whole, stored) + states))

        def load() -> None:
            load_rows(model, weights.rows)
            for layer in plan.layers:
                require_finite(layer)

        distributed.on_all(load)
        super().__init__(measure(plan, model, started), processor)
        self.stored, self._canonical, self._scratch = stored, weights.canonical, work.scratch / "written"

    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        """Return the pruned model, without its weights, which `write` collects."""
        release_freed_memory()  # of the search: the first process collects whole files
        plan, network = self.plan, self.network
        tables = fold_tables(plan.coupling, network.problems, solution.orders)
        pruned = Pruned(
            model=self.whole,
            solution=solution,
            config=plan.config,
            tables=tables,
            gathers=list(new_gathers(plan.coupling, network.problems, solution.orders, network.layers).values()),
            layers=beside_natural(network.measures(), natural),
            probe=make_probe(self.model, short_inputs(self.model, plan.run.held_out)),
            reordered=reordered_outputs(plan.coupling, tables),
        )
        layers = {layer.parameter: name for name, layer in network.layers.items()}
        lengths = {name: len(parameter) for name, parameter in self.whole.named_parameters()}

        def shown(name: str) -> tuple[Tensor, int]:
            rows = network.shown[layers[name]] if name in layers else self.model.get_parameter(name).data
            return rows.to(self.stored), lengths[name]

        self.collected = CollectedWeights(lengths, self._canonical, shown)
        self.collected.edit = stored_order(plan, pruned)
        return pruned

    @torch.no_grad()
    def write(self, folder: Path, pruned: Pruned) -> None:
        """Write about twice as many files of weights as there are processes, which `serve` the one that writes."""
        attach(self.whole, self.collected)
        write_offloaded(
            self.whole,
            self.processor,
            self.collected,
            dtype=self.stored,
            gathered=bool(pruned.gathers),
            folder=folder,
            memory=-(-weight_bytes(self.whole, self.stored) // distributed.shards()),
        )

    def load(self, folder: Path) -> PreTrainedModel:
        return load_written_offloaded(self.whole, folder, self._scratch)

    def served(self) -> AbstractContextManager[None]:
        return self.collected.served()

    @property
    def serve(self) -> Callable[[], None]:
        return self.collected.serve
