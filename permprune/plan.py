"""The plan of a run: the layers to prune, the orders to choose, and the examples to use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.config import SAMPLES, PruneConfig
from permprune.coupling.discovery import discover, observe
from permprune.coupling.space import Coupling
from permprune.coupling.trace import Untraceable
from permprune.data.answers import counted
from permprune.data.load import load_examples
from permprune.data.overlap import overlap
from permprune.errors import PermpruneError
from permprune.examples import Examples, by_length
from permprune.models.dummy_inputs import example_inputs
from permprune.models.forward import short_inputs
from permprune.models.generation import with_begun_text
from permprune.models.layers import DenseWeights, Layer, block_linears, dense_weights, prunable_layers
from permprune.models.modality import EXAMPLES_PER_WINDOW, Kind, clipped_length, kind_of
from permprune.models.processors import Processor
from permprune.models.shallow import Repetition, repetitions, shortened
from permprune.pattern import Pattern
from permprune.permuters.base import Identity, Run
from permprune.pruning.problem import Outline, Problem, build_problems
from permprune.registry import describe
from permprune.system import distributed
from permprune.system.device import compute_device, dtype_named, fast_dtype
from permprune.system.digests import CALIBRATION, model_digests, versions
from permprune.system.progress import log
from permprune.system.search_state import Checkpoint
from permprune.training.train import WINDOWS as STEP

FREE = ("effort", "order", "update", "train", "minutes", "batch", "recompute", "memory", "offload", "shard")
"""Fields of the config that may change before an interrupted search is resumed."""

PASSES = 20
"""The most passes over images, sentences or speech that the training of an effort makes; over text it makes one."""


@dataclass
class Plan:
    """The plan of a run, which is made before calibration.

    `outline` has the layers to prune and the orders to choose. `dense` describes the weights inside the blocks that are
    not pruned. `measured` are the examples for the statistics, and `dtype` is the data type of activations.
    """

    config: PruneConfig
    dtype: torch.dtype
    coupling: Coupling
    outline: Outline
    dense: DenseWeights
    measured: Examples
    run: Run

    def overlap(self, evaluation: Examples) -> float:
        """Return the share of the evaluation data that the calibration data contain (`permprune.data.overlap`)."""
        return overlap([self.measured, self.run.held_out, self.run.train], evaluation)


def plan_run(
    model: PreTrainedModel,
    config: PruneConfig,
    *,
    examples: Examples,
    weights: Mapping[str, Tensor],
    partial: Path | None = None,
) -> Plan:
    """Discover the couplings of a model and divide the examples between statistics, held-out loss and gradients.

    The model may be on the meta device, with its weights on disk; `weights` are the model's weights by name, from which
    a digest is computed. `partial` is as in `prepare`. Raises `PermpruneError`.
    """
    pattern = config.parsed_pattern
    layers = prunable_layers(model, pattern, config.exclude)
    device, kind = compute_device(model), kind_of(model)
    examples_per_window = EXAMPLES_PER_WINDOW[kind]
    config = config.replace(length=clipped_length(model, config.length))
    measured, held_out, train = examples.split(config.shares(len(examples), examples_per_window))
    if kind == "embeddings":  # in batches of similar length, which have little padding
        order = by_length(train, config.batch * examples_per_window, torch.Generator().manual_seed(config.seed))
        train = train[torch.cat(order)]
    config, passes = _within_data(config, kind, max(1, len(train) // examples_per_window))
    coupling = _couple(model, short_inputs(model, with_begun_text(model, measured)), layers, config.mode)
    outline = _outline(coupling, layers, pattern, config.mode)
    _warn_of_outputs(coupling, outline.problems, config)
    counts = len(outline.layers), len(outline.problems)
    log.info("%d layers to prune, %d orders to choose (%s mode)", *counts, config.mode)
    dtype = dtype_named(config.precision) or fast_dtype(device)
    searched = {name: value for name, value in config.identity().items() if name not in FREE}
    searched |= {**model_digests(model, weights.items()), CALIBRATION: measured.digest, **versions()}
    distributed.require_same(searched)
    run = Run(
        train,
        held_out,
        config.seed,
        config.minutes,
        checkpoint=Checkpoint(partial, searched),
        examples_per_window=examples_per_window,
        passes=passes,
    )
    dense = dense_weights(model, outline.sites, config.exclude)
    return Plan(config, dtype, coupling, outline, dense, measured, run)


def _within_data(config: PruneConfig, kind: Kind, windows: int) -> tuple[PruneConfig, int]:
    """Return the config with no more steps of training than the data suffice for, if an effort set them.

    Returns the passes over the `windows` to train on as well, of which a warning tells if there are several, or if the
    steps are fewer.
    """
    train = config.recipe.train
    if config.effort is None or not train.steps:
        return config, 1
    wanted, most = train.steps, (1 if kind == "text" else PASSES) * windows // STEP
    steps = min(wanted, max(1, most))
    passes = math.ceil(steps * STEP / windows)
    if steps < wanted or passes > 1:
        fewer = f", in {steps} steps in place of {wanted}" if steps < wanted else ""
        often = "once" if passes == 1 else f"up to {passes} times"
        log.warning(
            "there are %d windows to train on: training sees each %s%s; more calibration data would help",
            windows,
            often,
            fewer,
        )
    return config.replace(train=describe(dataclasses.replace(train, steps=steps))), passes


def _warn_of_outputs(coupling: Coupling, problems: Iterable[Problem], config: PruneConfig) -> None:
    """Log a warning if the search may reorder channels of what the model returns beside its logits."""
    reordered = coupling.reordered(problem.space for problem in problems)
    if reordered and config.recipe.order.name != Identity.name:
        log.warning(
            "beside its logits the model returns %s, whose channels will be in the new order of %s: "
            "if you read them, use --mode gather",
            ", ".join(reordered),
            ", ".join(dict.fromkeys(space for spaces in reordered.values() for space in spaces)),
        )


def outline_model(model: PreTrainedModel, config: PruneConfig) -> Outline:
    """Find the layers to prune and the orders to choose from the shapes of a model, which is on the meta device.

    Of many equal blocks only the first ones are traced, if the model runs without the others. Raises `PermpruneError`.
    """
    pattern, lists = config.parsed_pattern, repetitions(model)
    layers = prunable_layers(model, pattern, config.exclude)
    try:
        outline = _traced(model, pattern, config.mode, lists)
    except Untraceable:
        if not lists:
            raise
        lists = []
        outline = _traced(model, pattern, config.mode, lists)
    return outline.repeat(lists).of(layers)


def _traced(model: PreTrainedModel, pattern: Pattern, mode: str, lists: Sequence[Repetition]) -> Outline:
    with shortened(model, lists):
        layers = [layer for layer in block_linears(model) if pattern.divides(layer.weight.shape[1])]
        example = {name: tensor.to(next(model.parameters()).device) for name, tensor in example_inputs(model).items()}
        return _outline(_couple(model, example, layers, mode), layers, pattern, mode)


def _couple(model: PreTrainedModel, example: dict[str, Tensor], layers: list[Layer], mode: str) -> Coupling:
    """Discover the couplings of a model.

    In gather mode, a model that cannot be traced gets only sites, which are found by a forward pass. Raises
    `Untraceable` in fold mode.
    """
    try:
        return discover(model, example)
    except Untraceable as error:
        if mode != "gather":
            raise
        log.warning("%s: every order needs its own gather", error.what)
        return observe(model, example, layers)


def calibration_count(model: PreTrainedModel, config: PruneConfig) -> int:
    """Return the number of examples that correspond to `config.samples` windows."""
    return (config.samples or SAMPLES) * EXAMPLES_PER_WINDOW[kind_of(model)]


def calibration_examples(model: PreTrainedModel, processor: Processor | None, config: PruneConfig) -> Examples:
    """Load the calibration examples: `calibration_count`, or all if there are fewer. Raises `PermpruneError`.

    Of several sources, each gives an equal share, or all it has, evenly spread over the others, so that the statistics,
    the held-out loss and every gradient see all sources. Gradients see other documents of a text than the statistics
    and the held-out loss, which otherwise could not tell what training has learned by heart from what it has learned.
    """
    if processor is None:
        raise PermpruneError("without a tokenizer or another processor give the calibration as examples")
    count, sources = calibration_count(model, config), len(config.sources)
    *others, _ = config.shares(count, EXAMPLES_PER_WINDOW[kind_of(model)])
    parts = [
        load_examples(
            source,
            model,
            processor,
            part="calibration",
            count=-(-count // sources),
            length=config.length,
            seed=config.seed,
            shared=config.shared,
            apart=sum(others),
        )
        for source in config.sources
    ]
    if any("labels" in part for part in parts):  # of answers: all tokens of text beside them count
        parts = [counted(part) if part.keys() == ["input_ids"] else part for part in parts]
    return Examples.interleave(parts)[:count]


def _outline(coupling: Coupling, layers: Sequence[Layer], pattern: Pattern, mode: str) -> Outline:
    """Return the layers with the names of what they read (`Layer.input_of`), and the orders to choose.

    Layers that take no part in the forward pass are left out, with a warning. Raises `PermpruneError` if none is left.
    """
    names = {reader: site.name for site in coupling.sites for reader in site.readers}
    used = [layer for layer in layers if layer.parameter in names]
    if idle := [layer.name for layer in layers if layer.parameter not in names]:
        log.warning("not used in the forward pass, so these stay dense: %s", ", ".join(idle))
    if not used:
        raise PermpruneError("no layer that the pattern fits takes part in the forward pass: there is nothing to prune")
    sites = {layer.name: layer.input_of(names[layer.parameter]) for layer in used}
    return Outline(pattern, used, sites, build_problems(coupling, used, pattern, mode))
