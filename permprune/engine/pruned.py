"""The result of a run: the pruned model in stored order, its record, and how it is written."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.checkpoints.companions import base_model_of, licence_of
from permprune.checkpoints.gathers import Gather
from permprune.checkpoints.io import load_written, write_weights
from permprune.checkpoints.offload import Edit
from permprune.checkpoints.origin import origin_of, recorded_patterns, require_patterns
from permprune.checkpoints.probe import Probe, check_outputs
from permprune.checkpoints.record import FORMAT, Mix, PrunedLayer, Record
from permprune.config import PruneConfig
from permprune.coupling.fold import fold_parameter
from permprune.coupling.space import Coupling
from permprune.models.layers import Layer, dense_weights
from permprune.models.processors import Processor
from permprune.permuters.base import Solution
from permprune.plan import Plan
from permprune.pruning.folder import push_to_hub, write_pruned
from permprune.pruning.masked import LayerMeasure, MaskedLayers
from permprune.pruning.problem import Orders, Problem
from permprune.system.files import atomic_folder
from permprune.zoo.models import note

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")
"""Packages whose versions the record contains."""

ROWS, CHANNELS = 12, 32
"""The largest numbers of rows and channels of a sample."""


@dataclass(kw_only=True)
class Pruned:
    """A pruned model whose channels are in stored order, and how it was pruned.

    `solution` is the result of the search and `config` the config of the run. `tables` are the permutations that it
    folds, by space, int64 (blocks, channels); `permutations` are those of all prunings of the model, and `gathers` all
    reorderings that it performs at run time. `layers` has, for each pruned layer, the share of squared saliency kept
    and the relative output error, in natural order (`kept_none`, `error_none`) and as pruned (`kept`, `error`). `probe`
    contains random inputs and the model's outputs for them before the orders were folded (`make_probe`). `reordered`
    are the outputs beside the logits whose channels are in the order of spaces in `tables`, with their names. `sample`
    contains a few weights before and after pruning (see `sample`); it is None if no process held the model whole. `mix`
    is how the patterns of a mix were chosen.
    """

    model: PreTrainedModel
    solution: Solution
    config: PruneConfig
    tables: dict[str, Tensor]
    permutations: dict[str, Tensor]
    gathers: list[Gather]
    layers: list[PrunedLayer]
    probe: Probe
    reordered: dict[str, list[str]]
    sample: dict[str, Any] | None = None
    mix: Mix | None = None

    def record(self) -> Record:
        """Return the record of how the model was pruned; fields that `prune` does not measure are None."""
        origin, pruned = origin_of(self.model), [layer.name for layer in self.layers]
        name, before = origin.name, origin.record
        values = {
            "format": FORMAT,
            "version": importlib.metadata.version("permprune"),
            "model": name,
            "note": note(name),
            "settings": self.config.to_json(),
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "layers": [asdict(layer) for layer in self.layers],
            "curve": [asdict(point) for point in self.solution.curve],
            "permutations": {space: table.tolist() for space, table in self.permutations.items()},
            "gathers": [asdict(gather) for gather in self.gathers],
            "reordered": {**(before.reordered if before else {}), **self.reordered},
            "dense": asdict(dense_weights(self.model, pruned, self.config.exclude)),
            "sample": self.sample,
            "mix": self.mix and asdict(self.mix),
            "seconds": {"search": self.solution.seconds},
            "base_model": before.base_model if before else base_model_of(self.model, name),
            "license": (before and before.license) or licence_of(name),
        }
        return Record.of(values)

    def save_pretrained(self, folder: str | Path, processor: Processor | None = None) -> None:
        """Write the model to a folder that `load` and `verify` accept, as `prune_to_folder` does.

        The folder contains the config, the weights in the data type in which they were read, the processor, the record,
        the probe, a report and a model card. `folder` must not exist; it is created when all files are complete. Raises
        `PermpruneError` if the weights were changed after pruning; use `permprune.save` to write such a model.
        """
        record = self.record()
        trained = "if you have trained it since, write it with permprune.save"
        check_outputs(self.model, self.probe, "this model", trained)
        require_patterns(self.model, recorded_patterns(self.model, record.layers))
        weights = partial(write_weights, self.model, processor, origin_of(self.model).dtype)
        with atomic_folder(Path(folder)) as filled:
            write_pruned(record, self.probe, weights, filled, load=partial(load_written, self.model))

    def push_to_hub(self, repo_id: str, processor: Processor | None = None, **options: Any) -> str:
        """Write the model to a temporary folder as `save_pretrained` does, and upload it to the Hugging Face Hub.

        The options are those of `permprune.push_to_hub`. The model card shows how to load the model from the Hub.
        Returns the URL of the repository. Raises `PermpruneError`.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, processor)
            return push_to_hub(folder, repo_id, **options)


def stored_form(
    plan: Plan,
    model: PreTrainedModel,
    solution: Solution,
    *,
    layers: list[PrunedLayer],
    probe: Probe,
    sample: dict[str, Any] | None = None,
) -> Pruned:
    """Return a solution in the form in which it is stored: permutations to fold, and gathers.

    Problems without an order keep their natural one. The other arguments are fields of the result.
    """
    tables = fold_tables(plan.coupling, plan.outline.problems, solution.orders)
    moved = [name for name, table in tables.items() if not (table == torch.arange(table.shape[-1])).all()]
    return Pruned(
        model=model,
        solution=solution,
        config=plan.config,
        tables=tables,
        permutations=compose_tables(folded_tables(model), tables),
        gathers=_gathers(plan, solution.orders),
        layers=layers,
        probe=probe,
        reordered=plan.coupling.reordered(moved),
        sample=sample,
    )


def stored_order(plan: Plan, pruned: Pruned) -> Edit:
    """Return the edit that puts the channels of masked weights in stored order: folded, or reordered for gathers."""
    orders, gathered = pruned.solution.orders, dict[str, tuple[Layer, Tensor]]()
    for problem, layers in _gathered_problems(plan, orders):
        gathered |= {layer.parameter: (layer, orders[problem.name]) for layer in layers}

    def edit(name: str, tensor: Tensor) -> Tensor:
        fold_parameter(name, tensor, pruned.tables, plan.coupling)
        if name not in gathered:
            return tensor
        layer, order = gathered[name]  # of all experts, as one gather serves them all
        return tensor.detach().index_select(-2 if layer.transposed else -1, order.to(tensor.device))

    return edit


def beside_natural(measures: list[LayerMeasure], natural: list[LayerMeasure]) -> list[PrunedLayer]:
    """Combine the measures of each layer as pruned with those in natural order."""
    return [
        PrunedLayer(**asdict(layer), kept_none=before.kept, error_none=before.error)
        for layer, before in zip(measures, natural, strict=True)
    ]


def _gathered_problems(plan: Plan, orders: Orders) -> Iterator[tuple[Problem, list[Layer]]]:
    """Yield the problems that cannot be folded and have another order than the natural one, each with its layers."""
    layers = {layer.name: layer for layer in plan.outline.layers}
    for problem in plan.outline.problems:
        order = orders.get(problem.name)
        if not problem.space and order is not None and not torch.equal(order, problem.identity()):
            yield problem, [layers[part.layer] for part in problem.parts]


def _gathers(plan: Plan, orders: Orders) -> list[Gather]:
    """Return the gathers of a solution, each of the output of a module or of the inputs of several.

    If other modules read the site as well, its tensor has to stay in the old order.
    """
    sites, gathers = {site.name: site for site in plan.coupling.sites}, []
    for problem, readers in _gathered_problems(plan, orders):
        site, order = sites[problem.site], orders[problem.name].tolist()
        if site.gather[0] == "output" and {layer.parameter for layer in readers} == set(site.readers):
            gathers.append(Gather(problem.site, site.gather[1], [], order))
        else:
            modules = list(dict.fromkeys(layer.owner_name for layer in readers))
            gathers.append(Gather(problem.site, "", modules, order))
    return gathers


def fold_tables(coupling: Coupling, problems: Iterable[Problem], orders: Orders) -> dict[str, Tensor]:
    """Return the permutations to fold, by space: int64 (blocks, size); blocks without an order keep the natural one."""
    tables: dict[str, Tensor] = {}
    sizes = {space.name: (space.blocks, space.size) for space in coupling.spaces}
    for problem in problems:
        if problem.space and problem.name in orders:
            blocks, size = sizes[problem.space]
            table = tables.setdefault(problem.space, torch.arange(size).repeat(blocks, 1))
            table[problem.block] = orders[problem.name]
    return tables


def folded_tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the permutations that were folded into a model's weights since it was dense, by space."""
    record = origin_of(model).record
    return {space: torch.tensor(table) for space, table in (record.permutations if record else {}).items()}


def compose_tables(first: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine permutations, folded one after the other, into one for each space."""
    after = {space: first[space].gather(1, table) if space in first else table for space, table in then.items()}
    return {**first, **after}


def sample(network: MaskedLayers, measures: Sequence[PrunedLayer]) -> dict[str, Any]:
    """Return a few weights of the layer whose kept saliency the order raises most.

    `measures` are the measures of the network's layers, with the current orders and in natural order. "natural" and
    "permuted" are tables of (rows, channels) in natural and in stored order: "score" is the squared score in whole
    percents of a high one, and "kept" is 1 if the saliency's mask keeps the weight, else 0. The masks of a weight
    update, which may differ, are not shown.
    """
    layer = max(measures, key=lambda layer: layer.kept - layer.kept_none)
    name = layer.name
    scores, pattern = network.scores[name], network.patterns[name]
    stored = network.stored_columns()[name].to(scores.device)
    count = min(CHANNELS, scores.shape[1]) // pattern.m * pattern.m or pattern.m
    rows = scores[torch.linspace(0, len(scores) - 1, min(ROWS, len(scores))).long()].double()
    high = rows.square().quantile(0.98).clamp_min(1e-30)

    def part(columns: Tensor) -> dict[str, list[list[int]]]:
        shown = rows[:, columns[:count]]
        percents = (100 * shown.square() / high).clamp_max(100).round().int().tolist()
        return {"score": percents, "kept": pattern.mask(shown).int().tolist()}

    natural = torch.arange(scores.shape[1], device=scores.device)
    kept = {"kept_none": layer.kept_none, "kept": layer.kept}
    return {"layer": name, "m": pattern.m, **kept, "natural": part(natural), "permuted": part(stored)}
