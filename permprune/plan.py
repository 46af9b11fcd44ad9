"""What will be searched in a model, decided before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.config import PruneConfig
from permprune.coupling.discovery import discover
from permprune.coupling.observe import observe
from permprune.coupling.space import Coupling
from permprune.coupling.trace import Untraceable
from permprune.data.load import load_examples
from permprune.data.overlap import overlap
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.models.forward import short_inputs
from permprune.models.layers import DenseWeights, Layer, dense_weights, prunable_layers
from permprune.models.modality import EXAMPLES_PER_WINDOW, kind_of
from permprune.models.processors import Processor
from permprune.pattern import Pattern, parse_pattern
from permprune.permuters.base import Run
from permprune.pruning.problem import Problem, build_problems
from permprune.saliency.base import Saliency
from permprune.saliency.registry import saliency
from permprune.system.device import compute_device, fast_dtype
from permprune.system.digests import CALIBRATION, model_digests, versions
from permprune.system.progress import log
from permprune.system.search_state import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FREE = ("permute", "minutes", "update", "batch", "recompute")
"""Fields of the config that may change before an interrupted search goes on."""


@dataclass
class Plan:
    """What will be searched in a model, before anything is measured.

    `sites` names the tensor that each layer reads, `dense` what stays dense inside the blocks; `measured` are the
    examples for the statistics, through which activations have type `dtype`.
    """

    config: PruneConfig
    pattern: Pattern
    metric: Saliency
    dtype: torch.dtype
    coupling: Coupling
    layers: list[Layer]
    problems: list[Problem]
    sites: dict[str, str]
    dense: DenseWeights
    measured: Examples
    run: Run

    def overlap(self, evaluation: Examples) -> float:
        """The share of an evaluation that is in the calibration as well (`permprune.data.overlap`)."""
        return overlap([self.measured, self.run.held_out, self.run.train], evaluation)


def plan_run(
    model: PreTrainedModel,
    config: PruneConfig,
    *,
    examples: Examples,
    weights: Mapping[str, Tensor],
    partial: Path | None = None,
) -> Plan:
    """Discover the couplings and share out the examples; `partial` is as that of `prepare`.

    The model may be on the meta device, with its weights on disk: `weights` are the model's, by name, for a digest.
    Raises `PermpruneError`.
    """
    pattern, metric = parse_pattern(config.pattern), saliency(config.saliency)
    layers = prunable_layers(model, pattern, config.exclude)
    device = compute_device(model)
    examples_per_window = EXAMPLES_PER_WINDOW[kind_of(model)]
    measured, held_out, train = _divide(examples, config, examples_per_window)
    coupling = _couple(model, short_inputs(model, measured), layers, config.mode)
    sites = _sites(coupling, layers)
    layers = [layer for layer in layers if layer.name in sites]
    problems = build_problems(coupling, layers, pattern, config.mode)
    log.info("%d layers to prune, %d orders to choose (%s mode)", len(layers), len(problems), config.mode)
    dtype = DTYPES.get(config.precision) or fast_dtype(device)
    searched = {name: value for name, value in config.identity().items() if name not in FREE}
    searched |= {**model_digests(model, weights.items()), CALIBRATION: measured.digest, **versions()}
    run = Run(
        train,
        held_out,
        config.seed,
        config.minutes,
        checkpoint=Checkpoint(partial, searched),
        examples_per_window=examples_per_window,
    )
    dense = dense_weights(model, sites, config.exclude)
    return Plan(config, pattern, metric, dtype, coupling, layers, problems, sites, dense, measured, run)


def _couple(model: PreTrainedModel, example: dict[str, Tensor], layers: list[Layer], mode: str) -> Coupling:
    """The couplings of a model; in gather mode the sites alone will do, where it cannot be traced."""
    try:
        return discover(model, example)
    except Untraceable as error:
        if mode != "gather":
            raise
        log.warning("%s: every order takes a gather of its own", error.what)
        return observe(model, example, [layer.name for layer in layers])


def calibration_count(model: PreTrainedModel, config: PruneConfig) -> int:
    """How many examples `samples` windows stand for."""
    return config.samples * EXAMPLES_PER_WINDOW[kind_of(model)]


def calibration_examples(model: PreTrainedModel, processor: Processor | None, config: PruneConfig) -> Examples:
    """Of the calibration data as many examples as are worth `samples` windows, or as there are."""
    if processor is None:
        raise PermpruneError("without a tokenizer or another processor give the calibration as examples")
    count = calibration_count(model, config)
    shared, source = config.shared, config.calibration
    return load_examples(
        source,
        model,
        processor,
        part="calibration",
        count=count,
        length=config.length,
        seed=config.seed,
        shared=shared,
    )


def _divide(examples: Examples, config: PruneConfig, examples_per_window: int) -> list[Examples]:
    """Examples for statistics, held-out loss and gradients (see `PruneConfig.shares`)."""
    shares = config.shares(len(examples), examples_per_window)
    if shares[-1] < 1:
        raise PermpruneError(
            f"the calibration has {len(examples)} examples, 3 are the least: give more, or of a text a smaller --length"
        )
    return examples.split(shares)


def _sites(coupling: Coupling, layers: Iterable[Layer]) -> dict[str, str]:
    """The tensor each layer reads; those that read none are left out, and stay dense."""
    names = {reader: site.name for site in coupling.sites for reader in site.readers}
    sites = {layer.name: names[layer.parameter] for layer in layers if layer.parameter in names}
    if idle := [layer.name for layer in layers if layer.name not in sites]:
        log.warning("no part in the forward pass, so these stay dense: %s", ", ".join(idle))
    if not sites:
        raise PermpruneError("no layer that the pattern fits takes part in the forward pass: there is nothing to prune")
    return sites
