"""Forecast of a run of `prune`: memory by stage and part, disk space and time, from the model's config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel

from permprune.calibration.moments import accumulator_bytes
from permprune.calibration.statistics import sums_by_pass
from permprune.checkpoints.offload import SHARD
from permprune.checkpoints.origin import origin_of
from permprune.config import PruneConfig
from permprune.evaluation.size import weight_bytes
from permprune.examples import Examples, batches
from permprune.forecasts.activations import Activations, Gradients
from permprune.forecasts.costs import changes_of, stages_of, stages_of_limit, stages_of_mix, state_bytes
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.machine import BUS, Machine, this_machine
from permprune.forecasts.offloading import FILES, Offload, module_sizes
from permprune.forecasts.passes import TYPICAL, UNCOUNTED, Shapes, batch_pass, example_pass
from permprune.forecasts.resources import Memory, Part, Phase, Stage, Work, Workload
from permprune.forecasts.weights import solving, trained_weights
from permprune.models.generation import needs_decoder_inputs
from permprune.models.modality import (
    BATCH_MULTIPLIER,
    EVALUATION_BATCH,
    EVALUATION_WINDOWS,
    EXAMPLES_PER_WINDOW,
    LIGHT,
    evaluation_batch,
    evaluation_count,
    fitting_length,
    kind_of,
)
from permprune.models.narrow_weights import end_weights, held_bytes, held_type, is_narrow
from permprune.models.processors import takes_pairs
from permprune.pattern import MIXED
from permprune.plan import Plan, calibration_count
from permprune.pruning.problem import Outline
from permprune.system import distributed
from permprune.system.device import dtype_named
from permprune.system.shelf import Place

SHORT = 16
"""The tokens of text on which what was written is compared with the model."""

TRANSCRIBED = 1.7
"""Passes over an example that take as long as to generate its text (benchmarks/forecasts.py)."""

UNENDED = 5.4
"""The same for a text as a model writes it that is pruned in natural order: it repeats itself as far as it may."""

SORTED = 8
"""The number of batches whose texts are sorted by length together: about as many as those of a step of training."""


@dataclass(frozen=True)
class Subject:
    """The subject of forecasts: runs on a model, which is on the meta device, with any settings.

    `outline` is that of `outline_model`, `stored` the type in which the weights are stored, and `windows` the number of
    windows of the evaluation. The run has so many `processes`, all on this machine unless `torchrun` says otherwise.
    `size` are the height and width of images, if they are not those of the model's config, and `examples` the number of
    examples to calibrate on, if it is known. The model generates a text for `transcribed` of them.
    """

    name: str
    model: PreTrainedModel
    outline: Outline
    machine: Machine
    stored: torch.dtype
    windows: int = EVALUATION_WINDOWS
    processes: int = 1
    size: tuple[int, int] | None = None
    examples: int | None = None
    transcribed: int = 0


def forecast_held(
    subject: Subject, config: PruneConfig, shards: int = 1, *, example: Activations | None = None
) -> Forecast:
    """Forecast a run that holds the whole model in memory, or of which each of `shards` processes holds a share.

    In the latter case all processes divide the rows of the weights. With `example`, a pass over one example of the
    data, only the time is forecast, without the memory of activations. Raises `PermpruneError`.
    """
    held = _HeldRun(subject, config, shards, example)
    run, stages, room = held.run, tuple(held.stages()), (0.0, math.inf, 0.0)
    if held.offloads:
        device = (config.memory or 0) if run.on_device else 0
        stages, room = Offload.of(subject.model, run).stages(stages, device, config.host_limit - program_bytes())
    if config.packed == "int4":
        stages = *stages, held.packing()
    experts = sum(layer.weight.numel() for layer in run.outline.layers if layer.expert is not None)
    return Forecast(
        config=config,
        machine=subject.machine,
        stages=stages,
        disk={
            "checkpoint": held.checkpoint,
            "states of the search": state_bytes(held.recipe, run.outline),
            "tensors at rest": max(stage.bytes("disk") for stage in stages),
            "experts as fused": subject.stored.itemsize * experts if held.offloads else 0,
        },
        program=program_bytes(),
        room=room,
        processes=subject.processes,
        shards=shards,
        assumed=tuple(_assumed(subject.model, config, run, subject.processes)),
    )


class _HeldRun:
    """The stages of the run that `forecast_held` describes, with what they hold and do where nothing is offloaded."""

    def __init__(self, subject: Subject, config: PruneConfig, shards: int, example: Activations | None) -> None:
        self.subject, self.config, self.shards = subject, config, shards
        self.recipe = config.recipe
        self.fisher, self.offloads = self.recipe.order.uses_fisher or config.pattern == MIXED, config.offload != "none"
        self.outline = replace(subject.outline, dtype=held_type(subject.stored), shards=shards)
        self.dtype = dtype_named(config.precision) or subject.machine.dtype
        self.counts = example is None
        self.example = example or example_pass(subject.model, config, size=subject.size, lists=self.outline.repeated)
        self.checkpoint = weight_bytes(subject.model, subject.stored)
        self.weights = Memory(Part.WEIGHTS, held_bytes(subject.model, subject.stored) // shards)

    def counted(self, gradients: Gradients, **settings: Any) -> Activations:
        """The activations of a batch."""
        if not self.counts:
            return UNCOUNTED
        settings = {"dtype": self.dtype, **settings}
        model, size = self.subject.model, self.subject.size
        return batch_pass(model, self.outline, gradients, config=self.config, size=size, **settings)

    @cached_property
    def run(self) -> Workload:
        """The layers, orders and passes of the run."""
        subject, config, kind = self.subject, self.config, kind_of(self.subject.model)
        count = subject.examples or calibration_count(subject.model, config)
        measured, held_out, _ = config.shares(count, EXAMPLES_PER_WINDOW[kind])
        forward = Work(products=self.example.operations, moved=self.example.moved)
        return Workload(
            outline=self.outline,
            threads=subject.machine.threads if self.shards == 1 else 1,
            forward=forward * (1 / self.shards),
            batch=config.batch * BATCH_MULTIPLIER[kind],
            gradient=self.counted("weights"),
            loss=self.counted("none", batch=LIGHT * config.batch),
            dtype=self.dtype,
            held_out=held_out,
            measured=measured,
            examples_per_window=EXAMPLES_PER_WINDOW[kind],
            recompute=config.recompute,
            labelled=kind == "text",
            one_label=kind in ("sentences", "embeddings", "images"),
            on_device=subject.machine.device.type != "cpu",
            rests=cast(Place, "device" if config.place == "none" else config.place),
        )

    def stages(self) -> Iterator[Stage]:
        """Yield the stages in their order."""
        searching = [*self.searching()]
        working = [
            *self.transcribing(),
            self.calibrating(),
            *searching,
            *stages_of_limit(self.config, searching),
            self.evaluating(),
        ]
        yield self.loading()
        for stage in working:
            yield replace(stage, work=stage.work and stage.work * (self.shards / self.subject.processes))
        yield self.writing()

    def loading(self) -> Stage:
        """Processes that divide rows convert their own from fp32, parameter by parameter."""
        model, stored = self.subject.model, self.subject.stored
        largest = max(max(module_sizes(model).values()), *self.ends)
        read = Memory("tensor that is read", stored.itemsize * largest if self.run.on_device else 0, "host")
        whole = Memory(Part.WEIGHTS, weight_bytes(model, torch.float32) // self.shards)
        weights = self.weights if self.shards == 1 else whole
        return Stage(Phase.LOAD, (weights, read), Work(stored=self.checkpoint))

    def transcribing(self) -> list[Stage]:
        """The dense model generates texts where the data has none."""
        if not self.subject.transcribed:
            return []
        work = self.measuring.forward * (TRANSCRIBED * self.subject.transcribed)
        return [Stage(Phase.TRANSCRIBE, (self.weights,), work)]

    def calibrating(self) -> Stage:
        """Passes forward, several if not all sums fit in the memory limit, and backward for the Fisher information."""
        run, outline, examples = self.run, self.run.outline, self.run.measured
        limit = None if self.offloads else self.config.memory
        each = sums_by_pass(outline.widths, limit and limit * outline.shards)
        size = max(accumulator_bytes(widths.values()) for widths in each) // outline.shards
        sums = [Memory(Part.MOMENT_SUMS, size, travels=size * (2.0 * -(-examples // run.batch) + 1))]
        if by_block := run.rests != "device":  # all examples run through one block before the next
            sums = [
                Memory(Part.BLOCK_SUMS, 4 * outline.block_sums),
                Memory(Part.BLOCK_OUTPUTS, run.block_outputs(examples)),
            ]
        stored = _moments_bytes(outline)
        moments = Memory(Part.SECOND_MOMENTS, stored if by_block or len(each) > 1 else 0, travels=float(stored))
        wide = self.fisher and run.dtype == torch.float32 != outline.dtype and not run.recompute
        converted = Memory("weights in fp32", 4 * outline.weights if wide else 0)  # until the backward pass
        work = run.pass_work(examples, run.batch, len(each))
        work += Work(products_fp32=2 * self.example.positions * examples * outline.moments())
        if self.fisher:
            work += run.forward * examples + run.pass_work(examples, run.batch, run.recompute + by_block)
            work += run.position_work(examples)
            sums.append(Memory(Part.FISHER, 8 * sum(outline.rows.values())))
        passing = self.counted("inputs" if self.fisher else "none").parts
        return Stage(Phase.CALIBRATE, (self.weights, *passing, *sums, moments, converted), work)

    def searching(self) -> Iterator[Stage]:
        """Yield the choice of patterns, the search, and the changes of the weights."""
        for stage in stages_of_mix(self.config, self.run):
            yield stage.beside(self.network)
        for stage in (*stages_of(self.recipe.order, self.run), *changes_of(self.recipe, self.run)):
            yield replace(stage.beside(self.network), limited=True)

    def evaluating(self) -> Stage:
        """Evaluations, which compute in fp32, and the layers' errors in the natural order and in the one found."""
        model, kind = self.subject.model, kind_of(self.subject.model)
        passes: float = evaluations(self.config) + (kind == "embeddings")  # which are compared with the dense model's
        if kind == "speech" and model.can_generate():
            passes = UNENDED + TRANSCRIBED * (evaluations(self.config) - 1)
        evaluated = passes * evaluation_count(model, self.subject.windows)
        work = self.measuring.pass_work(evaluated, evaluation_batch(model)) + self.energies * 2
        parts = self.counted("none", dtype=torch.float32, batch=EVALUATION_BATCH).parts
        return Stage(Phase.EVALUATE, parts, work).beside(self.changed)

    def writing(self) -> Stage:
        """Convert the weights, and compare what was written with them; the model is freed before that is read."""
        stored, on_device = self.subject.stored, self.run.on_device
        files = FILES if self.offloads else self.shards
        copied = 2 * stored.itemsize * max(self.ends) if self.offloads else 0  # a file has one tensor at least
        file = max(copied, min(self.checkpoint // files, self.checkpoint if files == 1 else 2 * SHARD))
        as_stored = (Memory("weights as stored", file, "host"),)
        checked = self.checked()
        if files > 1:  # of which one after the other is freed before they are checked
            parts = max(as_stored, checked, key=lambda parts: sum(part.bytes for part in parts))
        else:
            parts = (*as_stored, *checked) if on_device else ()
        return Stage(Phase.WRITE, (*self.changed, *parts), Work(stored=self.checkpoint) + self.energies)

    def packing(self) -> Stage:
        """Read the model that was written, whole and on the host, and solve its values of int4."""
        memory, work = solving(self.run, self.run.measured)
        whole = Memory("weights to pack", self.checkpoint, "host" if self.run.on_device else "device")
        return Stage(Phase.PACK, (whole, replace(memory, place=whole.place)), work + Work(stored=2 * self.checkpoint))

    def checked(self) -> tuple[Memory, ...]:
        """The memory of the check of what was written, on two examples of `short_inputs`."""
        counted = self.counted("none", dtype=torch.float32, batch=2, ends=torch.float32)
        elsewhere = not is_narrow(self.subject.stored) or (self.offloads and self.run.on_device)  # where it is in hand
        layer = 4 * (max(module_sizes(self.subject.model).values()) + max(self.ends))
        activations = round(min(1.0, SHORT / self.config.length) * (counted.blocks + counted.logits))
        return (
            Memory("layers in fp32", 0 if elsewhere else layer, "host"),
            Memory("activations of the check", activations, "host"),
        )

    @cached_property
    def ends(self) -> list[int]:
        """The numbers of weights of the model's ends, and 0 for a model without any."""
        return [0, *(weight.numel() for weight, _ in end_weights(self.subject.model))]

    @property
    def network(self) -> tuple[Memory, ...]:
        """The memory of the masked model."""
        masks, moments = Memory("masks", self.outline.weights // 8), _moments_bytes(self.outline)
        return self.weights, masks, Memory(Part.SECOND_MOMENTS, moments)

    @property
    def changed(self) -> tuple[Memory, ...]:
        """The memory of the masked model after the changes of its weights."""
        return (*self.network, *([trained_weights(self.run)] if self.recipe.changes else []))

    @property
    def measuring(self) -> Workload:
        """The run with passes in fp32."""
        forward = self.run.forward
        return replace(self.run, forward=Work(products_fp32=forward.products, moved=forward.moved))

    @property
    def energies(self) -> Work:
        """The work of the mean squared outputs of all layers, of dense weights or of errors (`output_energy`)."""
        outline = self.outline
        each = (2.0 * layer.shape[1] ** 2 * outline.rows[layer.name] for layer in outline.layers)
        return Work(products_fp32=sum(each))


def evaluations(config: PruneConfig) -> int:
    """Evaluations of a run: the dense model, the pruned one in natural order, in the order found, and rounded."""
    return 3 + config.rounded


def program_bytes() -> int:
    """Return the resident bytes of this process; after a forecast it has loaded what a run imports, but no weights."""
    return int(psutil.Process().memory_info().rss)


def _assumed(model: PreTrainedModel, config: PruneConfig, run: Workload, processes: int) -> Iterator[str]:
    """Yield the assumptions of the forecast, one sentence each."""
    if (length := fitting_length(model, config.length)) < config.length:
        yield f"the model has {length} positions: the length is {length} tokens in place of {config.length}"
    for one in run.outline.repeated:
        yield f"{one.kept} of the {one.total} blocks in {one.name} were traced: the others equal one of them in shape"
    if any(layer.expert is not None for layer in run.outline.layers):
        yield "tokens are spread evenly over the experts"
    if kind_of(model) in ("sentences", "embeddings"):
        yield f"sentences have --length tokens in memory, and {TYPICAL['sentences']} on average"
    if takes_pairs(model):
        yield "texts have no images"
    if run.on_device and run.rests != "device":
        files = ", all of it from files on the disk" if run.rests == "disk" else ""
        yield f"{BUS / 1e9:.0f} GB a second travel to and from the device{files}, while nothing is computed"
    if run.on_device and config.packed == "int4":
        yield "values of int4 are solved on the host, which takes longer than the device would"
    if processes > 1:
        yield f"the {processes} processes do equal parts of the work, and send what they exchange in no time"


def _moments_bytes(outline: Outline) -> int:
    """The bytes of the results of `InputMoments`: correlations in fp16 with their scales if the weights are narrow."""
    widths = outline.widths.values()
    total = accumulator_bytes(widths)
    return (total // 2 + 4 * sum(widths) if is_narrow(outline.dtype) else total) // outline.shards


def forecast_plan(model: PreTrainedModel, plan: Plan, windows: int) -> Forecast:
    """Forecast the time of a run with a plan, which holds the whole model; its memory is not forecast.

    `windows` is the number of windows of the evaluation. The lengths are those of the examples.
    """
    origin, processes = origin_of(model), distributed.world()
    examples = sum(len(part) for part in (plan.measured, plan.run.held_out, plan.run.train))
    subject = Subject(
        origin.name, model, plan.outline, this_machine(), origin.dtype, windows, processes, examples=examples
    )
    if needs_decoder_inputs(model, plan.measured):
        subject = replace(subject, transcribed=examples)
    shown = _shown(plan.run.train, plan.config.batch * BATCH_MULTIPLIER[kind_of(model)])
    return forecast_held(subject, plan.config, example=example_pass(model, plan.config, shown=shown))


def _shown(examples: Examples, batch: int) -> Shapes:
    """The shapes of an example as it is shown to a model, of texts in a batch with the mean length of batches."""
    shapes: dict[str, tuple[int, ...]] = {}
    seen = [part for group in examples.split(SORTED * batch) for part in batches(group, batch)]
    for name in examples:
        shape = [(1, *part[name].shape[1:]) for part in seen]
        shapes[name] = (1, round(fmean(length for _, length in shape))) if len(shape[0]) == 2 else shape[0]
    return shapes
