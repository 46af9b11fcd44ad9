"""The stages of pruning: discover couplings, calibrate, score, permute, prune, update, fold."""

from __future__ import annotations

import importlib.metadata
import reprlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.calibration.statistics import calibrate
from permprune.checkpoints.gathers import Gather, attach_gathers, compose
from permprune.checkpoints.io import load_written, write_weights
from permprune.checkpoints.licence import base_model_of, licence_of
from permprune.checkpoints.origin import origin_of, set_origin
from permprune.checkpoints.patterns import recorded_patterns, require_patterns
from permprune.checkpoints.probe import Probe, check_outputs, make_probe
from permprune.checkpoints.record import FORMAT, PrunedLayer, Record
from permprune.config import PruneConfig
from permprune.coupling.fold import fold_all
from permprune.coupling.space import Coupling
from permprune.errors import PermpruneError
from permprune.examples import ExampleData, Examples
from permprune.losses.targets import choose_task
from permprune.models.attention import autocast
from permprune.models.forward import computed_in, frozen, short_inputs
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs
from permprune.models.layers import Layer, dense_weights
from permprune.models.modality import BATCH_MULTIPLIER, kind_of
from permprune.models.narrow_weights import NarrowWeights
from permprune.models.processors import Processor
from permprune.pattern import MIXED
from permprune.permuters.base import Callback, Solution
from permprune.permuters.registry import permuter
from permprune.plan import Plan, calibration_count, calibration_examples, plan_run
from permprune.pruning.allocation import mix
from permprune.pruning.folder import write_pruned
from permprune.pruning.hub import MESSAGE, push_to_hub
from permprune.pruning.masked import LayerMeasure
from permprune.pruning.network import PrunedNetwork
from permprune.pruning.preview import sample
from permprune.pruning.problem import Orders, Problem
from permprune.pruning.stored import fold_tables, gather_places, reorder_columns, reordered_outputs
from permprune.system.device import compute_device
from permprune.system.files import atomic_folder
from permprune.system.out_of_memory import memory_reported
from permprune.updates.registry import update
from permprune.updates.share import update_network
from permprune.zoo.models import note

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")
"""Packages whose versions the record contains."""


@dataclass
class Prepared(Plan):
    """A plan and its calibrated model: everything that does not depend on the permuter.

    `network` is the masked model and `seconds` the time that the preparation took.
    """

    model: PreTrainedModel
    network: PrunedNetwork
    seconds: float


@dataclass(kw_only=True)
class Pruned:
    """A pruned model whose channels are in stored order, and how it was pruned.

    `solution` is the result of the search and `config` the config of the run. `tables` are the folded permutations by
    space, int64 (channels,), and `gathers` all reorderings that the model performs at run time. `layers` has, for each
    pruned layer, the share of squared saliency kept and the relative output error, in natural order (`kept_none`,
    `error_none`) and as pruned (`kept`, `error`). `probe` contains random inputs and the model's outputs for them
    before the orders were folded (`make_probe`). `reordered` are the outputs beside the logits whose channels are in
    the order of spaces in `tables`, with their names. `sample` contains a few weights before and after pruning (see
    `sample`); it is None if the model was read layer by layer.
    """

    model: PreTrainedModel
    solution: Solution
    config: PruneConfig
    tables: dict[str, Tensor]
    gathers: list[Gather]
    layers: list[PrunedLayer]
    probe: Probe
    reordered: dict[str, list[str]]
    sample: dict[str, Any] | None = None

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
            "permutations": {space: table.tolist() for space, table in self.tables.items()},
            "gathers": [asdict(gather) for gather in self.gathers],
            "reordered": {**(before.reordered if before else {}), **self.reordered},
            "dense": asdict(dense_weights(self.model, pruned, self.config.exclude)),
            "sample": self.sample,
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

    def push_to_hub(
        self,
        repo_id: str,
        processor: Processor | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        revision: str | None = None,
        message: str = MESSAGE,
    ) -> str:
        """Write the model to a temporary folder as `save_pretrained` does, and upload it to the Hugging Face Hub.

        The options are as in `permprune.push_to_hub`. The model card shows how to load the model from the Hub. Returns
        the URL of the repository. Raises `PermpruneError`.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, processor)
            return push_to_hub(
                folder,
                repo_id,
                private=private,
                token=token,
                endpoint=endpoint,
                revision=revision,
                message=message,
            )


@memory_reported()
def prepare(
    model: PreTrainedModel,
    processor: Processor | None,
    config: PruneConfig,
    *,
    examples: ExampleData | None = None,
    partial: Path | None = None,
) -> Prepared:
    """Discover the couplings, calibrate the model, and mask its weights in natural order.

    `processor` is the tokenizer of a language model, or the processor of images or audio. `examples` replace the
    config's calibration data, as in `prune`. If they lack text for a decoder, the decoder reads the text that the dense
    model generates. `partial` is a folder in which the searches save their state. Raises `PermpruneError` for a config,
    data or a model that cannot be used.
    """
    if config.shard:
        raise PermpruneError(
            "only permprune prune, started by torchrun, divides weights among processes: leave shard out"
        )
    started = time.monotonic()
    if examples is None:
        shown = calibration_examples(model, processor, config)
    else:
        shown = Examples.of(examples, calibration_count(model, config))
        config = replace(config, calibration=f"{len(shown)} examples given in Python")
    if needs_decoder_inputs(model, shown):
        shown = with_decoder_inputs(model, shown, config.batch * BATCH_MULTIPLIER[kind_of(model)])
    plan = plan_run(model, config, examples=shown, weights=model.state_dict(), partial=partial)
    return measure(plan, model, started)


def measure(plan: Plan, model: PreTrainedModel, started: float) -> Prepared:
    """Calibrate the model of a plan, and mask its weights in natural order; the preparation `started` at this time."""
    config, layers, sites, dtype = plan.config, plan.layers, plan.sites, plan.dtype
    batch, recompute = config.batch * BATCH_MULTIPLIER[kind_of(model)], config.recompute
    with frozen(model), torch.no_grad(), autocast(compute_device(model), dtype):
        task = choose_task(model, plan.measured, batch)
    held = NarrowWeights(model, layers, origin_of(model).dtype)
    statistics = calibrate(
        model,
        layers,
        sites,
        plan.measured,
        task,
        dtype=dtype,
        batch=batch,
        memory=config.memory,
        recompute=recompute,
        half=bool(held.types),
        seed=config.seed,
    )
    patterns = dict.fromkeys(sites, plan.pattern)
    if config.pattern == MIXED:
        patterns = mix(layers, plan.problems, sites, statistics, plan.metric)
    network = PrunedNetwork(
        model,
        layers,
        plan.problems,
        sites,
        statistics=statistics,
        saliency=plan.metric,
        patterns=patterns,
        task=task,
        dtype=dtype,
        batch=batch,
        recompute=recompute,
        held=held,
    )
    return Prepared(**vars(plan), model=model, network=network, seconds=time.monotonic() - started)


def update_weights(prepared: Prepared) -> None:
    """Apply the config's weight update with the current orders of the network. Raises `PermpruneError`."""
    update_network(update(prepared.config.update), prepared.network, prepared.measured, prepared.run.held_out)


def finish(prepared: Prepared, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
    """Fold the orders of a solution into the current weights of the network, which has to have this solution.

    `natural` are the network's measures in natural order. `prepared` must not be used afterwards.
    """
    model, network = prepared.model, prepared.network
    measures = beside_natural(network.measures(), natural)
    shown = sample(network, measures)
    network.write()
    round_weights(model.parameters(), origin_of(model).dtype)
    with computed_in(model, torch.float32):
        probe = make_probe(model, short_inputs(model, prepared.run.held_out))
    tables = fold_tables(prepared.coupling, network.problems, solution.orders)
    fold_all(model, tables, prepared.coupling)
    gathers = _gather(prepared, solution.orders)
    pruned = Pruned(
        model=model,
        solution=solution,
        config=prepared.config,
        tables=tables,
        gathers=gathers,
        layers=measures,
        probe=probe,
        reordered=reordered_outputs(prepared.coupling, tables),
        sample=shown,
    )
    set_origin(model, replace(origin_of(model), record=pruned.record(), probe=probe))
    return pruned


@torch.no_grad()
def round_weights(weights: Iterable[Tensor], stored: torch.dtype) -> None:
    """Round weights in place to the type in which they will be stored, so that what is measured is what is written."""
    for weight in weights:
        if weight.is_floating_point():
            weight.copy_(weight.to(stored))


@memory_reported()
def prune(
    model: PreTrainedModel,
    processor: Processor | None = None,
    config: PruneConfig | None = None,
    *,
    examples: ExampleData | None = None,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Pruned:
    """Permute and prune a model in place.

    `processor` is the tokenizer of a language model, or the processor of images or audio. `config` holds the settings;
    `changes` replace fields of it, for example `pattern="2:4", permute=Newton(rounds=6)`. `examples` replace the
    config's calibration data: `Examples`, a dict of tensors, token ids (count, length), or an iterable of dicts such as
    a `DataLoader`, of which at most `samples` windows are read. `callbacks` are called after every round of an
    iterative search (see `Round`). In gather mode the index selections are attached to the model, after any that it
    already has. Raises `PermpruneError`, also for an unknown field.
    """
    config = PruneConfig() if config is None else config
    if not isinstance(config, PruneConfig):
        raise PermpruneError(f"the config is {reprlib.repr(config)}: give a PruneConfig, or its fields as keywords")
    config = config.replace(**changes)
    set_origin(model, origin_of(model))
    prepared = prepare(model, processor, config, examples=examples)
    prepared.dense.warn()
    update_weights(prepared)
    natural = prepared.network.measures()
    run = replace(prepared.run, callbacks=tuple(callbacks))
    solution = permuter(prepared.config.permute).solve(prepared.network, run)
    update_weights(prepared)
    return finish(prepared, solution, natural)


def beside_natural(measures: list[LayerMeasure], natural: list[LayerMeasure]) -> list[PrunedLayer]:
    """Combine the measures of each layer as pruned with those in natural order."""
    return [
        PrunedLayer(**asdict(own), kept_none=before.kept, error_none=before.error)
        for own, before in zip(measures, natural, strict=True)
    ]


def new_gathers(
    coupling: Coupling, problems: list[Problem], orders: Orders, layers: Mapping[str, Layer]
) -> dict[str, Gather]:
    """Return the gathers that a pruned model needs, by problem; natural orders need none.

    `layers` are the pruned layers by name.
    """
    sites = {site.name: site for site in coupling.sites}
    found = {}
    for problem in problems:
        order = orders[problem.name]
        if problem.space or torch.equal(order, problem.identity()):
            continue
        output, inputs = gather_places(sites[problem.site], [layers[part.layer] for part in problem.parts])
        found[problem.name] = Gather(problem.site, output, inputs, order.tolist())
    return found


@torch.no_grad()
def _gather(prepared: Prepared, orders: Orders) -> list[Gather]:
    """Reorder the columns of every gathered layer and attach the gathers; returns all gathers of the model."""
    layers = prepared.network.layers
    found = new_gathers(prepared.coupling, prepared.problems, orders, layers)
    for problem in prepared.problems:
        if problem.name in found:
            for layer in {layers[part.layer].parameter: layers[part.layer] for part in problem.parts}.values():
                layer.stored.copy_(reorder_columns(layer.stored, layer, orders[problem.name]))
    attach_gathers(prepared.model, list(found.values()))
    return compose(origin_of(prepared.model).gathers, found.values())
