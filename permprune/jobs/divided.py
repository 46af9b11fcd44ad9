"""Prune a model of whose weights each process holds some rows (`permprune.models.row_shards`)."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from torch import Tensor

from permprune.checkpoints.offload import CollectedWeights, attach, read_offloaded, write_offloaded
from permprune.checkpoints.probe import make_probe
from permprune.config import PruneConfig
from permprune.evaluation.size import weight_bytes
from permprune.forecasts.costs import state_bytes
from permprune.jobs.streaming import stored_order
from permprune.models.forward import short_inputs
from permprune.models.layers import require_finite
from permprune.models.row_shards import load_rows
from permprune.permuters.base import Solution
from permprune.permuters.registry import permuter
from permprune.pipeline import Pruned, beside_natural, measure, new_gathers, round_weights
from permprune.plan import calibration_examples, plan_run
from permprune.pruning.masked import LayerMeasure
from permprune.pruning.stored import fold_tables, reordered_outputs
from permprune.system import distributed
from permprune.system.files import WorkFolder, require_space
from permprune.system.memory import release_freed_memory


class DividedModel:
    """A model whose weights the processes read, prune and write in parts; inside `distributed.dividing_rows`.

    `prepared` is the model as `prepare` returns it, with the rows of this process. No process holds all weights: each
    reads its rows from the checkpoint, and to write the model, one file of weights at a time is collected. Raises
    `PermpruneError`, on all processes, for a checkpoint or data that cannot be used.
    """

    def __init__(self, name: str, config: PruneConfig, work: WorkFolder) -> None:
        started, folder = time.monotonic(), work.scratch / f"rank-{distributed.rank()}"
        model, self.processor, self.stored, weights = read_offloaded(
            name, folder, trust_remote_code=config.trust_remote_code
        )
        self.whole = copy.deepcopy(model)  # without weights: for the record, and to write
        shown = calibration_examples(model, self.processor, config)
        plan = plan_run(model, config, examples=shown, weights=weights.stored, partial=work.path)
        states = state_bytes(permuter(config.permute), plan.outline)
        distributed.on_first(lambda: require_space(work.out, weight_bytes(self.whole, self.stored) + states))

        def load() -> None:
            load_rows(model, weights.rows)
            for layer in plan.layers:
                require_finite(layer)

        distributed.on_all(load)
        self.prepared = measure(plan, model, started)
        self._canonical = weights.canonical

    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        """Return the pruned model, without its weights; `collected` are the weights to be written.

        The network has to have this solution; `natural` are its measures in natural order.
        """
        release_freed_memory()  # of the search: the first process collects whole files
        prepared, network = self.prepared, self.prepared.network
        round_weights([*network.trained.values(), *network.updated.values()], self.stored)
        tables = fold_tables(prepared.coupling, network.problems, solution.orders)
        pruned = Pruned(
            model=self.whole,
            solution=solution,
            config=prepared.config,
            tables=tables,
            gathers=list(new_gathers(prepared.coupling, network.problems, solution.orders, network.layers).values()),
            layers=beside_natural(network.measures(), natural),
            probe=make_probe(prepared.model, short_inputs(prepared.model, prepared.run.held_out)),
            reordered=reordered_outputs(prepared.coupling, tables),
        )
        layers = {layer.parameter: name for name, layer in network.layers.items()}
        lengths = {name: len(parameter) for name, parameter in self.whole.named_parameters()}

        def own(name: str) -> tuple[Tensor, int]:
            shown = network.shown[layers[name]] if name in layers else prepared.model.get_parameter(name).data
            return shown.to(self.stored), lengths[name]

        self.collected = CollectedWeights(lengths, self._canonical, own)
        self.collected.edit = stored_order(prepared, pruned)
        return pruned

    @torch.no_grad()
    def write(self, folder: Path, *, gathered: bool) -> None:
        """Write the weights and the processor to a folder, in about twice as many files as there are processes.

        `gathered` is as in `write_offloaded`. The first process writes, while the others serve the weights
        (`CollectedWeights.serve`).
        """
        attach(self.whole, self.collected)
        write_offloaded(
            self.whole,
            self.processor,
            self.collected,
            dtype=self.stored,
            gathered=gathered,
            folder=folder,
            memory=-(-weight_bytes(self.whole, self.stored) // distributed.shards()),
        )
