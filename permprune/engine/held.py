"""A model whose weights are in memory: its preparation, and its weights during a run."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.budget.allocate import Sensitivity
from permprune.calibration.statistics import calibrate
from permprune.checkpoints.gathers import attach_gathers, compose
from permprune.checkpoints.io import load_written, write_weights
from permprune.checkpoints.origin import origin_of, set_origin
from permprune.checkpoints.probe import make_probe
from permprune.checkpoints.record import Mix
from permprune.checkpoints.source import ModelSource, OpenModel, open_model
from permprune.config import PruneConfig
from permprune.engine.mixing import choose_patterns, sensitivity
from permprune.engine.pruned import Pruned, beside_natural, sample, stored_form, stored_order
from permprune.errors import PermpruneError
from permprune.examples import ExampleData, Examples
from permprune.forecasts.efforts import resolve
from permprune.losses.targets import choose_task
from permprune.models.autocast import autocast
from permprune.models.dummy_inputs import processed_size
from permprune.models.forward import computed_in, frozen, kept_in_fp32, short_inputs
from permprune.models.generation import needs_decoder_inputs, with_decoder_inputs
from permprune.models.modality import BATCH_MULTIPLIER, kind_of
from permprune.models.narrow_weights import NarrowWeights
from permprune.models.processors import Processor
from permprune.pattern import MIXED
from permprune.permuters.base import Callback, Run, Solution
from permprune.plan import Plan, calibration_count, calibration_examples, plan_run
from permprune.pruning.masked import LayerMeasure
from permprune.pruning.network import PrunedNetwork
from permprune.recipe import Recipe
from permprune.saliency.metrics import saliency
from permprune.system.device import compute_device
from permprune.system.failures import failures_reported
from permprune.system.progress import CALIBRATE, NATURAL, log, stage
from permprune.system.search_state import Journal
from permprune.system.shelf import Shelf


@dataclass
class Prepared(Plan):
    """A plan and its calibrated model: everything that does not depend on the permuter.

    `network` is the masked model and `seconds` the time that the preparation took.
    """

    model: PreTrainedModel
    network: PrunedNetwork
    seconds: float


@failures_reported()
def prepare(
    model: PreTrainedModel,
    processor: Processor | None,
    config: PruneConfig,
    *,
    examples: ExampleData | None = None,
    partial: Path | None = None,
    planned: Callable[[Plan], object] = lambda plan: None,
    held: NarrowWeights | None = None,
    fisher: bool = True,
) -> Prepared:
    """Discover the couplings, calibrate the model, and mask its weights in natural order.

    `processor` is the tokenizer of a language model, or the processor of images or audio. `examples` replace the
    config's calibration data, as in `prune`. If they lack text for a decoder, the decoder reads the text that the dense
    model generates. `partial` is a folder in which the searches save their state. `planned` is called with the plan
    before the calibration. `held` are weights of the model that are held in bf16 already, and `fisher` is as in
    `calibrate`. Raises `PermpruneError` for a config, data or a model that cannot be used.
    """
    if config.shard:
        raise PermpruneError(
            "only permprune prune, started by torchrun, divides weights among processes: leave shard out"
        )
    if config.offload != "none":
        raise PermpruneError("only permprune prune offloads, and a model that it reads itself: leave offload out")
    started, config = time.monotonic(), config.completed()
    if examples is None:
        shown = calibration_examples(model, processor, config)
    else:
        shown = Examples.of(examples, calibration_count(model, config))
        config = config.replace(calibration=f"{len(shown)} examples given in Python")
    with nullcontext() if held is None else held.as_stored():  # so that the trace shows the model's own operations
        plan = plan_run(model, config, examples=shown, weights=model.state_dict(), partial=partial)
    planned(plan)
    return measure(plan, model, started, held, fisher=fisher)


def measure(
    plan: Plan,
    model: PreTrainedModel,
    started: float,
    held: NarrowWeights | None = None,
    *,
    fisher: bool = True,
    shelf: Shelf | None = None,
) -> Prepared:
    """Calibrate the model of a plan, and mask its weights in natural order; the preparation `started` at this time.

    `held` and `fisher` are as in `prepare`. What the run keeps beside the weights rests where tensors of `shelf` do, by
    default on the device.
    """
    stage(CALIBRATE)
    plan = transcribed(plan, model)
    config, outline, dtype = plan.config, plan.outline, plan.dtype
    batch, recompute = config.batch * BATCH_MULTIPLIER[kind_of(model)], config.recompute
    with frozen(model), torch.no_grad(), autocast(compute_device(model), dtype):
        task = choose_task(model, plan.measured, batch)
    held = held or NarrowWeights.of(model, outline.layers, origin_of(model).dtype)
    statistics = calibrate(
        model,
        outline.layers,
        outline.sites,
        plan.measured,
        task,
        dtype=dtype,
        batch=batch,
        memory=config.memory,
        recompute=recompute,
        half=bool(held.types),
        seed=config.seed,
        fisher=fisher or config.pattern == MIXED,
        shelf=shelf,
    )
    network = PrunedNetwork(
        model,
        outline,
        statistics=statistics,
        saliency=saliency(config.saliency),
        patterns=dict.fromkeys(outline.sites, outline.pattern),
        task=task,
        dtype=dtype,
        batch=batch,
        recompute=recompute,
        held=held,
        shelf=shelf,
    )
    return Prepared(**vars(plan), model=model, network=network, seconds=time.monotonic() - started)


def transcribed(plan: Plan, model: PreTrainedModel) -> Plan:
    """Return the plan with the text that the dense model generates for sounds without any; saved with the searches."""
    if not needs_decoder_inputs(model, plan.measured):
        return plan
    run, parts = plan.run, [plan.measured, plan.run.held_out, plan.run.train]
    log.info("the dense model writes the transcripts of %d sounds", sum(map(len, parts)))
    with Journal(run.checkpoint, "transcripts") as journal:
        texts = [with_decoder_inputs(model, part, journal, f"{n}.") for n, part in enumerate(parts)]
    return replace(plan, measured=texts[0], run=replace(run, held_out=texts[1], train=texts[2]))


def open_to_prune(source: ModelSource, config: PruneConfig, processor: Processor | None) -> OpenModel:
    """Open a model to prune it: one that is read holds the weights that are stored in bf16 once, as they are."""
    task, code = config.task, config.trust_remote_code
    return open_model(source, processor, task=task, trust_remote_code=code, narrow=True)


@failures_reported()
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
    `changes` replace fields of it, for example `pattern="2:4", order=Newton(rounds=6)`. Unless they give a permuter,
    the effort does, by default "minutes", which trains the weights that are kept; with effort="order" none changes.
    `examples` replace the config's calibration data: `Examples`, a dict of tensors, token ids (count, length), or an
    iterable of dicts such as a `DataLoader`, of which at most `samples` windows are read. `callbacks` are called after
    every round of an iterative search (see `Round`). In gather mode the index selections are attached to the model,
    after any that it already has. Raises `PermpruneError`, also for an unknown field.
    """
    if not isinstance(model, torch.nn.Module):
        raise PermpruneError(
            f"the model is {reprlib.repr(model)}: give what permprune.read_model reads, or call prune_to_folder"
        )
    config = PruneConfig() if config is None else config
    if not isinstance(config, PruneConfig):
        raise PermpruneError(f"the config is {reprlib.repr(config)}: give a PruneConfig, or its fields as keywords")
    config = resolve(model, config.replace(**changes), processed_size(processor))
    config.require_no_limit("prune in Python")
    set_origin(model, origin_of(model))
    prepared = prepare(model, processor, config, examples=examples, fisher=config.recipe.order.uses_fisher)
    prepared.dense.warn()
    weights = Held(prepared, processor)
    try:
        run = replace(weights.plan.run, callbacks=tuple(callbacks))
        natural = weights.natural()
        return weights.finish(weights.run(prepared.config.recipe, run), natural)
    except BaseException:  # also Ctrl-C in a notebook, whose traceback keeps the network
        weights.restore()
        raise


class Held:
    """The weights of a prepared model, in memory: what a session asks of them.

    `model` runs with the weights that were shown last. `stored` is the type in which the checkpoint stores them,
    and `seconds` the time that the calibration took. `unanswering` says why the model cannot answer examples one token
    after the other; it is empty if it can. A model that is `spare` gives up its weights when what was written is
    loaded, so that one copy is in memory.

    Of a mix of patterns, `mix` is the choice (`choose_patterns`), made at once unless its budget is a loss,
    `chosen_for` the share of the weights that was asked for, and `all_layers` what was prepared before a choice.
    """

    unanswering: ClassVar[str] = ""

    mix: Mix | None = None

    def __init__(self, prepared: Prepared, processor: Processor | None, *, spare: bool = False) -> None:
        self.plan, self.network, self.all_layers = prepared, prepared.network, prepared
        self.chosen_for: float | None = None
        self.model, self.processor, self.stored = prepared.model, processor, origin_of(prepared.model).dtype
        self.seconds, self.spare = prepared.seconds, spare
        if self.plan.config.pattern == MIXED and self.plan.config.max_loss is None:
            self.choose_patterns()

    def choose_patterns(self, keep: float | None = None) -> None:
        """Choose a pattern for each layer (see `mixing`), if given for this share of the weights."""
        started = time.monotonic()
        self.network.detach()
        self.all_layers.network.attach()
        self.plan, self.mix = choose_patterns(self.all_layers, measured=lambda: self.sensitivity, keep=keep)
        self.network, self.chosen_for = self.plan.network, keep
        if keep is None:
            self.all_layers = self.plan  # the network of all layers is not needed again
            vars(self).pop("sensitivity", None)
        self.seconds += time.monotonic() - started

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """What the patterns of a mix cost each layer, measured once for all budgets that are tried."""
        return sensitivity(self.all_layers)

    @classmethod
    def of(cls, opened: OpenModel, config: PruneConfig, *, spare: bool = False, **settings: Any) -> Held:
        """Prepare a model that is open (see `prepare`, which takes the `settings`)."""
        set_origin(opened.model, origin_of(opened.model))
        prepared = prepare(opened.model, opened.processor, config, held=opened.held, **settings)
        return cls(prepared, opened.processor, spare=spare)

    @classmethod
    def open(cls, source: ModelSource, config: PruneConfig, processor: Processor | None = None) -> Held:
        """Open a model and prepare it. Raises `PermpruneError`."""
        return cls.of(open_to_prune(source, config, processor), config)

    def dense(self) -> AbstractContextManager[None]:
        """A context in which the model runs with its dense weights."""
        return self.network.dense_weights()

    def natural(self) -> list[LayerMeasure]:
        """Show the pruned weights in natural order, with their dense values; returns the layers' measures."""
        stage(NATURAL)
        self.network.set_weights({})
        self.network.set_orders(self.network.identity())
        self.network.set_bits({})
        return self.network.measures()

    def run(self, recipe: Recipe, run: Run) -> Solution:
        """Run a recipe, and show the weights that it prunes, as they will be stored. Raises `PermpruneError`."""
        stage(recipe.stages[0])
        solution = recipe.solve(self.network, run)
        trained = self.network.trained
        for name in trained:
            weight = trained[name]
            _round([weight], self.stored)
            trained[name] = weight
        return solution

    def finish(self, solution: Solution, natural: list[LayerMeasure]) -> Pruned:
        """Put the weights of a solution, which has to be the one shown, in stored order.

        `natural` are the measures in natural order. Nothing else can be shown afterwards.
        """
        plan, model, network, origin = self.plan, self.model, self.network, origin_of(self.model)
        measures = beside_natural(network.measures(), natural)
        shown = sample(network, measures)
        network.write()
        wide = kept_in_fp32(model, self.stored)
        _round([weight for name, weight in model.named_parameters() if not wide.search(name)], self.stored)
        with nullcontext() if network.held.active else computed_in(model, torch.float32):
            probe = make_probe(model, short_inputs(model, plan.run.held_out))
        pruned = stored_form(plan, model, solution, layers=measures, probe=probe, sample=shown)
        pruned.mix = self.mix
        edit = stored_order(plan, pruned)
        for name, weight in model.named_parameters():
            weight.data.copy_(edit(name, weight))
        network.held.release()
        attach_gathers(model, pruned.gathers)
        pruned.gathers = compose(origin.gathers, pruned.gathers)
        set_origin(model, replace(origin, record=pruned.record(), probe=probe))
        return pruned

    def write(self, folder: Path, pruned: Pruned) -> None:
        """Write the weights in stored order and the processor to a folder. Raises `PermpruneError`."""
        write_weights(pruned.model, self.processor, self.stored, folder)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load what was written to a folder, to check it; nothing can be written afterwards."""
        if self.spare:
            self.model.to("meta")  # type: ignore[arg-type]
        return load_written(self.model, folder)

    def restore(self) -> None:
        """Let the model run with its dense weights; nothing else can be shown afterwards."""
        self.all_layers.network.detach()  # the one attached if a mix is interrupted
        self.network.restore()

    def served(self) -> AbstractContextManager[None]:
        """A context of the first process in which the others `serve` it while it writes; by default nothing."""
        return nullcontext()

    def serve(self) -> None:
        """Help the first process to write, until it has ended; by default nothing."""


@torch.no_grad()
def _round(weights: Iterable[Tensor], stored: torch.dtype) -> None:
    """Round weights in place to the type in which they will be stored, so that what is measured is what is written."""
    for weight in weights:
        if weight.is_floating_point():
            weight.copy_(weight.to(stored))
