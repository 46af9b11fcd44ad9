"""The stages, walked once: couple, calibrate, score, permute, prune, update, fold."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.calibrate import Statistics, calibrate, frozen
from permprune.checkpoint import Checkpoint
from permprune.coupling import Coupling, Untraceable, discover, fold_all, observe
from permprune.data import TOGETHER, WORTH, kind_of, load_examples, overlap
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.layers import Layer, prunable_layers
from permprune.losses import fast_dtype
from permprune.mixture import MIXED, mix, parse_pattern
from permprune.model_io import write_weights
from permprune.network import PrunedNetwork
from permprune.options import Bytes, Count, Positive, Seed, require_fields
from permprune.pattern import Pattern
from permprune.permuters import Permuter, Run, Solution, permuter
from permprune.problem import MODES, Orders, Problem, build_problems
from permprune.processors import Processor
from permprune.progress import log
from permprune.pruning.folder import write_pruned
from permprune.pruning.gathers import Gather, attach_gathers, compose, gather_places
from permprune.pruning.origin import origin_of, set_origin
from permprune.pruning.patterns import recorded_patterns, require_patterns
from permprune.pruning.probe import check_outputs, make_probe
from permprune.pruning.record import FORMAT, Record
from permprune.resources import compute_device, keep_freed_memory
from permprune.saliency import Saliency, saliency
from permprune.sample import sample
from permprune.system.digests import CALIBRATION, model_digests, versions
from permprune.system.files import atomic_folder
from permprune.tasks import choose_task, model_inputs
from permprune.transcripts import lacks_text, transcribed
from permprune.updates import update, update_network
from permprune.zoo.models import note

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

FREE = ("minutes", "update", "batch", "recompute")
"""Settings that may change before an interrupted search goes on."""

VERSIONED = ("permprune", "torch", "transformers", "scipy", "safetensors")
"""Packages whose versions are recorded."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; the same settings give the same permutations.

    `pattern`: "N:M", or "mixed" for a pattern of each layer's own (`mix`). `saliency`: magnitude, wanda, ria or obs.
    `mode`: "fold" (no run-time cost) or "gather" (every reader of the residual stream in its own order, one
    `index_select` each). `calibration`: a source (see `load_examples`), None for the default one, of which `samples`
    examples are drawn, or windows of `length` tokens: the first `measured` give the statistics, the next `held_out` the
    accept test, the rest the gradients; of examples with one answer each more stand for each that is counted (`WORTH`).
    `precision`: of activations: fp32, bf16, or auto for the faster. `memory`: bytes for the statistics of one
    calibration pass; `prune_to_folder` reads a model that needs more in all layer by layer. `minutes`: end the search
    after so long. `exclude`: globs of layers that stay dense. `update`: none, or sparsegpt, which changes the weights
    at the orders found, as far as the held-out examples like it (`update_network`). `batch`: calibration examples that
    pass through the model at a time. `recompute`: run each block again in the backward pass instead of keeping its
    activations. `shared`: the evaluation comes from the same images, speech or sentences, of which each gets half.
    `trust_remote_code`: run the code that comes with a checkpoint, where the model is read by name (`read_model`).
    Raises `PermpruneError` for numbers out of range and unknown names.
    """

    pattern: str = "2:4"
    saliency: str = "wanda"
    mode: str = "fold"
    calibration: str | None = None
    samples: Count = 192
    length: Count = 512
    measured: Count = 24
    held_out: Count = 8
    seed: Seed = 0
    precision: str = "auto"
    memory: Bytes | None = None
    minutes: Positive | None = None
    exclude: tuple[str, ...] = ()
    update: str = "none"
    batch: Count = 4
    recompute: bool = False
    shared: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_fields(self)
        parse_pattern(self.pattern)
        saliency(self.saliency)
        update(self.update)
        if self.mode not in MODES or self.precision not in ("auto", *PRECISIONS):
            raise PermpruneError(
                f'mode "{self.mode}" with precision "{self.precision}": '
                f"choose a mode of {', '.join(MODES)} and a precision of auto, {', '.join(PRECISIONS)}"
            )

    def described(self, permute: str) -> dict[str, Any]:
        """The settings and the permuter's name for a record; methods of one's own by what they print as."""
        plain = (bool, int, float, str, tuple, type(None))
        values = {name: value if isinstance(value, plain) else str(value) for name, value in vars(self).items()}
        return {"permute": permute, **values}

    def shares(self, count: int, worth: int = 1) -> list[int]:
        """How many of `count` examples are for the statistics, the held-out loss and the gradients.

        `worth` of them stand for each window. Too few are shared out in the same proportion; the last share may be 0 or
        less where there are fewer than 3.
        """
        wanted = worth * (self.measured + self.held_out)
        share = min(1.0, count / (2 * wanted))
        measured, held_out = (max(1, int(share * worth * own)) for own in (self.measured, self.held_out))
        return [measured, held_out, count - measured - held_out]


@dataclass
class Plan:
    """What will be searched in a model, before anything is measured.

    `sites` names the tensor that each layer reads; `measured` are the examples for the statistics, through which
    activations have type `dtype`.
    """

    settings: Settings
    pattern: Pattern
    metric: Saliency
    dtype: torch.dtype
    coupling: Coupling
    layers: list[Layer]
    problems: list[Problem]
    sites: dict[str, str]
    measured: Examples
    run: Run

    def overlap(self, evaluation: Examples) -> float:
        """The share of an evaluation that is in the calibration as well (`permprune.data.overlap`)."""
        return overlap([self.measured, self.run.held_out, self.run.train], evaluation)


@dataclass
class Prepared(Plan):
    """A model, coupled and calibrated: all that does not depend on the permuter."""

    model: PreTrainedModel
    network: PrunedNetwork
    seconds: float


@dataclass
class Pruned:
    """A pruned model in stored order, and what was decided on the way.

    `settings` are the run's and its permuter's name as "permute". `tables` are the folded permutations by space,
    `gathers` all reorderings that the model does at run time. `layers` has, for each pruned layer, the share of squared
    saliency kept and the relative output error, in natural order ("kept_none", "error_none") and as pruned ("kept",
    "error"). `probe` are two examples with the model's outputs before the orders were folded (`make_probe`). `sample`
    shows a few weights before and after (see `sample`); None where the model was not held.
    """

    model: PreTrainedModel
    solution: Solution
    settings: dict[str, Any]
    tables: dict[str, Tensor]
    gathers: list[Gather]
    layers: list[dict[str, Any]]
    probe: dict[str, Tensor]
    sample: dict[str, Any] | None = None

    def record(self) -> Record:
        """How the model was pruned, as its folder tells it; what `prune` does not measure is None."""
        name = origin_of(self.model).name
        values = {
            "format": FORMAT,
            "version": importlib.metadata.version("permprune"),
            "model": name,
            "note": note(name),
            "settings": self.settings,
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "layers": self.layers,
            "curve": [asdict(point) for point in self.solution.curve],
            "permutations": {space: table.tolist() for space, table in self.tables.items()},
            "gathers": [asdict(gather) for gather in self.gathers],
            "sample": self.sample,
            "seconds": {"search": self.solution.seconds},
        }
        return Record.of(values)

    def save_pretrained(self, folder: str | Path, processor: Processor | None = None) -> None:
        """Write the whole folder, as `prune_to_folder` does: in either mode `load` and `verify_folder` take it.

        That is the config, the weights in the type that they were read in, the processor, the record, the probe and a
        report. `folder` must not exist yet; it appears when all is there. Raises `PermpruneError` if the weights are no
        longer those that pruning left: `permprune.save` writes them.
        """
        record = self.record()
        trained = "if you have trained it since, write it with permprune.save"
        check_outputs(self.model, self.probe, "this model", trained)
        require_patterns(self.model, recorded_patterns(self.model, record.layers))
        weights = partial(write_weights, self.model, processor, origin_of(self.model).dtype)
        with atomic_folder(Path(folder)) as filled:
            write_pruned(record, self.probe, weights, filled)


def prepare(
    model: PreTrainedModel,
    processor: Processor | None,
    settings: Settings,
    examples: Examples | Mapping[str, Tensor] | Tensor | None = None,
    partial: Path | None = None,
) -> Prepared:
    """Discover the couplings, calibrate, and show the network its masks in natural order.

    `processor` is the tokenizer, or what makes inputs of images or sound. `examples` are what to calibrate on in place
    of the settings' data, token ids (count, length) among them; a decoder that is given no text reads what the dense
    model writes. `partial` is a folder in which the searches keep their state. From here on the process keeps memory
    that it frees (`keep_freed_memory`). Raises `PermpruneError` for settings,
    data or a model that cannot be used.
    """
    started = time.monotonic()
    keep_freed_memory()
    if examples is None:
        shown = calibration_examples(model, processor, settings)
    else:
        shown = Examples.of(examples)
        settings = replace(settings, calibration=f"{len(shown)} examples given in Python")
    batch, recompute = settings.batch * TOGETHER[kind_of(model)], settings.recompute
    if lacks_text(model, shown):
        shown = transcribed(model, shown, batch)
    plan = plan_run(model, settings, shown, model.state_dict(), partial)
    layers, sites, dtype = plan.layers, plan.sites, plan.dtype
    with frozen(model), torch.no_grad(), torch.autocast(plan.measured.device.type, dtype, dtype != torch.float32):
        task = choose_task(model, plan.measured, batch)
    statistics = calibrate(
        model, layers, sites, plan.measured, task, dtype, batch, settings.memory, recompute, settings.seed
    )
    patterns = dict.fromkeys(sites, plan.pattern)
    if settings.pattern == MIXED:
        patterns = mix(layers, plan.problems, sites, statistics, plan.metric)
    network = PrunedNetwork(
        model, layers, plan.problems, sites, statistics, plan.metric, patterns, task, dtype, batch, recompute
    )
    return Prepared(**vars(plan), model=model, network=network, seconds=time.monotonic() - started)


def plan_run(
    model: PreTrainedModel,
    settings: Settings,
    examples: Examples,
    weights: Mapping[str, Tensor],
    partial: Path | None = None,
) -> Plan:
    """Discover the couplings and share out the examples; `partial` is as that of `prepare`.

    The model may be on the meta device, with its weights on disk: `weights` are the model's, by name, for a digest.
    Raises `PermpruneError`.
    """
    pattern, metric = parse_pattern(settings.pattern), saliency(settings.saliency)
    layers = prunable_layers(model, pattern, settings.exclude)
    device = compute_device(model)
    worth = WORTH[kind_of(model)]
    measured, held_out, train = _divide(examples.to(device), settings, worth)
    coupling = _couple(model, short_inputs(model, measured), layers, settings.mode)
    sites = _sites(coupling, layers)
    layers = [layer for layer in layers if layer.name in sites]
    problems = build_problems(coupling, layers, pattern, settings.mode)
    log.info("%d layers to prune, %d orders to choose (%s mode)", len(layers), len(problems), settings.mode)
    dtype = PRECISIONS.get(settings.precision) or fast_dtype(device)
    searched = {name: value for name, value in asdict(settings).items() if name not in FREE}
    searched |= {**model_digests(model, weights.items()), CALIBRATION: measured.digest, **versions()}
    run = Run(train, held_out, settings.seed, settings.minutes, Checkpoint(partial, searched), worth)
    return Plan(settings, pattern, metric, dtype, coupling, layers, problems, sites, measured, run)


def _couple(model: PreTrainedModel, example: dict[str, Tensor], layers: list[Layer], mode: str) -> Coupling:
    """The couplings of a model; in gather mode the sites alone will do, where it cannot be traced."""
    try:
        return discover(model, example)
    except Untraceable as error:
        if mode != "gather":
            raise
        log.warning("%s: every order takes a gather of its own", error.what)
        return observe(model, example, [layer.name for layer in layers])


def calibration_examples(model: PreTrainedModel, processor: Processor | None, settings: Settings) -> Examples:
    """Of the calibration data as many examples as are worth `samples` windows, or as there are."""
    if processor is None:
        raise PermpruneError("without a tokenizer or another processor give the calibration as examples")
    count = settings.samples * WORTH[kind_of(model)]
    shared, source = settings.shared, settings.calibration
    return load_examples(source, model, processor, "calibration", count, settings.length, settings.seed, shared)


def update_weights(prepared: Prepared) -> None:
    """Update the weights at the orders the network shows, as the settings say. Raises `PermpruneError`."""
    update_network(update(prepared.settings.update), prepared.network, prepared.measured, prepared.run.held_out)


def finish(prepared: Prepared, solution: Solution, natural: list[dict[str, Any]], permute: str) -> Pruned:
    """Fold the orders into the weights that the network shows for this solution. The prepared network is used up.

    `natural` are the network's measures in natural order; `permute` is the name of the permuter, for the record.
    """
    model, network = prepared.model, prepared.network
    probe = make_probe(model, short_inputs(model, prepared.run.held_out))
    measures = beside_natural(network.measures(), natural)
    shown = sample(network, measures)
    tables = fold_tables(prepared.coupling, network.problems, solution.orders)
    fold_all(model, tables, prepared.coupling)
    gathers = _gather(prepared, solution.orders)
    settings = prepared.settings.described(permute)
    pruned = Pruned(model, solution, settings, tables, gathers, measures, probe, shown)
    set_origin(model, replace(origin_of(model), record=pruned.record(), probe=probe))
    return pruned


def prune(
    model: PreTrainedModel,
    processor: Processor | None = None,
    permute: str | Permuter = "newton",
    examples: Examples | Mapping[str, Tensor] | Tensor | None = None,
    **settings: Any,
) -> Pruned:
    """Permute and prune a model in place; `settings` are the fields of `Settings`, as pattern="2:4", mode="fold".

    `examples` are as for `prepare`. In gather mode the index selections are attached to the returned model, after those
    that it may have already. Raises `PermpruneError`.
    """
    method = permuter(permute)
    set_origin(model, origin_of(model))
    prepared = prepare(model, processor, Settings(**settings), examples)
    update_weights(prepared)
    natural = prepared.network.measures()
    solution = method.solve(prepared.network, prepared.run)
    update_weights(prepared)
    return finish(prepared, solution, natural, permute if isinstance(permute, str) else method.name)


def gap_closed(value: float, dense: float, none: float, metric: str = "perplexity") -> float | None:
    """Share of the gap between the dense and the plainly pruned model, of perplexities in their logarithm.

    None where there is no gap.
    """
    if metric == "perplexity":
        value, dense, none = math.log(value), math.log(dense), math.log(none)
        return (none - value) / (none - dense) if none > dense else None
    return (value - none) / (dense - none) if dense != none else None


def _divide(examples: Examples, settings: Settings, worth: int) -> list[Examples]:
    """Examples for statistics, held-out loss and gradients (see `Settings.shares`)."""
    shares = settings.shares(len(examples), worth)
    if shares[-1] < 1:
        raise PermpruneError(
            f"the calibration has {len(examples)} examples, 3 are the least: give more, or of a text a smaller --length"
        )
    return examples.split(shares)


def short_inputs(model: PreTrainedModel, examples: Examples) -> dict[str, Tensor]:
    """Two examples as arguments of the model's forward, of windows of text the first few tokens; no attention masks."""
    inputs = model_inputs(model, examples[torch.arange(2) % len(examples)])
    if inputs.keys() == {"input_ids"}:
        return {"input_ids": inputs["input_ids"][:, :16]}
    return {name: tensor for name, tensor in inputs.items() if not name.endswith("attention_mask")}


def _sites(coupling: Coupling, layers: Iterable[Layer]) -> dict[str, str]:
    """The tensor each layer reads; those that read none are left out, and stay dense."""
    names = {reader: site.name for site in coupling.sites for reader in site.readers}
    sites = {layer.name: names[layer.parameter] for layer in layers if layer.parameter in names}
    if idle := [layer.name for layer in layers if layer.name not in sites]:
        log.warning("no part in the forward pass, so these stay dense: %s", ", ".join(idle))
    if not sites:
        raise PermpruneError("no layer that the pattern fits takes part in the forward pass: there is nothing to prune")
    return sites


def beside_natural(measures: list[dict[str, Any]], natural: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A network's measures, each layer's with those in natural order ("kept_none", "error_none")."""
    return [
        {**row, "kept_none": before["kept"], "error_none": before["error"]}
        for row, before in zip(measures, natural, strict=True)
    ]


def fold_tables(coupling: Coupling, problems: list[Problem], orders: Orders) -> dict[str, Tensor]:
    """The permutations to fold, by space: int64 (blocks, size); blocks without a problem keep their order."""
    tables: dict[str, Tensor] = {}
    sizes = {space.name: (space.blocks, space.size) for space in coupling.spaces}
    for problem in problems:
        if problem.space:
            blocks, size = sizes[problem.space]
            table = tables.setdefault(problem.space, torch.arange(size).repeat(blocks, 1))
            table[problem.block] = orders[problem.name]
    return tables


def new_gathers(coupling: Coupling, problems: list[Problem], orders: Orders) -> dict[str, Gather]:
    """The gathers that a loader must put back, by problem; those of orders that move nothing are left out."""
    sites = {site.name: site for site in coupling.sites}
    found = {}
    for problem in problems:
        order = orders[problem.name]
        if problem.space or torch.equal(order, problem.identity()):
            continue
        output, inputs = gather_places(sites[problem.site], [part.layer for part in problem.parts])
        found[problem.name] = Gather(problem.site, output, inputs, order.tolist())
    return found


@torch.no_grad()
def _gather(prepared: Prepared, orders: Orders) -> list[Gather]:
    """Reorder the columns of every gathered layer and attach the gathers; returns all that the model has then."""
    found = new_gathers(prepared.coupling, prepared.problems, orders)
    for problem in prepared.problems:
        if problem.name in found:
            for part in problem.parts:
                weight = prepared.network.layers[part.layer].weight
                weight.copy_(weight[:, orders[problem.name]])
    attach_gathers(prepared.model, list(found.values()))
    return compose(origin_of(prepared.model).gathers, found.values())


__all__ = ["Prepared", "Pruned", "Settings", "Statistics", "finish", "gap_closed", "prepare", "prune", "update_weights"]
