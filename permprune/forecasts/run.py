"""Forecast of a run of `prune`: memory by stage and part, disk space and time, from the model's config alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import cast

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
from permprune.forecasts.activations import Activations
from permprune.forecasts.costs import stages_of, state_bytes
from permprune.forecasts.forecast import Forecast
from permprune.forecasts.machine import BUS, Machine, this_machine
from permprune.forecasts.mixing import stages_of_limit, stages_of_mix
from permprune.forecasts.offloading import FILES, Offload, module_sizes
from permprune.forecasts.passes import TYPICAL, Shapes, batch_pass, example_pass, uncounted
from permprune.forecasts.resources import Memory, Phase, Stage, Work, Workload
from permprune.forecasts.weights import trained_weights, update_share
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
from permprune.permuters.registry import permuter
from permprune.plan import Plan, calibration_count, shares_of
from permprune.pruning.problem import Outline
from permprune.system import distributed
from permprune.system.device import dtype_named
from permprune.system.shelf import Place
from permprune.updates.base import NoUpdate
from permprune.updates.registry import update

SHORT = 16
"""The tokens of text on which what was written is compared with the model."""

TRANSCRIBED = 1.7
"""Passes over an example that take as long as to generate its text (benchmarks/forecasts.py)."""

UNENDED = 5.4
"""The same for a text as a model writes it that is pruned in natural order: it repeats itself as far as it may."""

EVALUATED = 3
"""Evaluations of a run: the dense model, the pruned one in natural order, and in the order found."""

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
    model, machine, stored, processes = subject.model, subject.machine, subject.stored, subject.processes
    outline = replace(subject.outline, dtype=held_type(stored), shards=shards)
    method, change, kind = permuter(config.permute), update(config.update), kind_of(model)
    per_window = EXAMPLES_PER_WINDOW[kind]
    dtype, batch = dtype_named(config.precision) or machine.dtype, config.batch * BATCH_MULTIPLIER[kind]
    counted: Callable[..., Activations] = partial(
        batch_pass, model, outline, config=config, dtype=dtype, size=subject.size
    )
    if example is None:
        example = example_pass(model, config, size=subject.size, lists=outline.repeated)
    else:
        counted = uncounted
    fisher = method.uses_fisher or config.pattern == MIXED
    gradient, evaluation = counted("weights"), counted("none", dtype=torch.float32, batch=EVALUATION_BATCH)
    measured, held_out, _ = shares_of(subject.examples or calibration_count(model, config), config, per_window)
    run = Workload(
        outline=outline,
        threads=machine.threads if shards == 1 else 1,
        forward=Work(products=example.operations, moved=example.moved) * (1 / shards),
        batch=batch,
        gradient=gradient,
        loss=counted("none", batch=LIGHT * config.batch),
        dtype=dtype,
        held_out=held_out,
        measured=measured,
        examples_per_window=per_window,
        recompute=config.recompute,
        labelled=kind == "text",
        one_label=kind in ("sentences", "embeddings", "images"),
        on_device=machine.device.type != "cpu",
        rests=cast(Place, "device" if config.place == "none" else config.place),
    )
    whole, checkpoint = weight_bytes(model, torch.float32) // shards, weight_bytes(model, stored)
    weights = Memory("weights", held_bytes(model, stored) // shards)
    network = (weights, Memory("masks", outline.weights // 8), Memory("second moments", _moments_bytes(outline)))
    searched = (*network, *([trained_weights(run)] if method.trains else []))
    held = searched if isinstance(change, NoUpdate) else (*searched, update_share(run))
    passes: float = EVALUATED + (kind == "embeddings")  # which are compared with the dense model's
    if kind == "speech" and model.can_generate():
        passes = UNENDED + TRANSCRIBED * (EVALUATED - 1)
    evaluated = passes * evaluation_count(model, subject.windows)
    measuring = replace(run, forward=Work(products_fp32=run.forward.products, moved=run.forward.moved))
    searching = [
        *(stage.beside(network) for stage in stages_of_mix(config, run)),
        *(replace(stage.beside(network), limited=True) for stage in stages_of(method, run)),
        *(stage.beside(searched) for stage in stages_of(change, run)),
    ]
    limit = config.memory if config.offload == "none" else None
    texts = Stage(Phase.TRANSCRIBE, (weights,), measuring.forward * (TRANSCRIBED * subject.transcribed))
    energies = Work(products_fp32=_energies(outline))
    evaluating = measuring.pass_work(evaluated, evaluation_batch(model)) + energies * 2  # dense, and in natural order
    stages: Sequence[Stage] = [
        *([texts] if subject.transcribed else []),
        _calibration(run, measured, fisher=fisher, memory=limit, positions=example.positions).beside(
            [weights, *counted("inputs" if fisher else "none").parts]
        ),
        *searching,
        *stages_of_limit(config, searching),
        Stage(Phase.EVALUATE, evaluation.parts, evaluating).beside(held),
    ]
    ends = [weight.numel() for weight, _ in end_weights(model)]
    largest = max(module_sizes(model).values())
    # processes that divide rows convert their own from fp32, parameter by parameter
    read = Memory("tensor that is read", stored.itemsize * max(largest, *ends, 0) if run.on_device else 0, "host")
    load = Stage(Phase.LOAD, (weights if shards == 1 else Memory("weights", whole), read), Work(stored=checkpoint))
    offloads = config.offload != "none"
    experts = sum(layer.weight.numel() for layer in outline.layers if layer.expert is not None)
    files, room = FILES if offloads else shards, (0.0, math.inf, 0.0)
    check = counted("none", dtype=torch.float32, batch=2, ends=torch.float32)  # on two examples of `short_inputs`
    short = min(1.0, SHORT / config.length)
    copied = 2 * stored.itemsize * max(ends, default=0) if offloads else 0  # a file has one tensor at least
    file = max(copied, min(checkpoint // files, checkpoint if files == 1 else 2 * SHARD))
    as_stored = (Memory("weights as stored", file, "host"),)
    elsewhere = not is_narrow(stored) or (offloads and run.on_device)  # where they are in hand
    checked = (
        Memory("layers in fp32", 0 if elsewhere else 4 * (largest + max(ends, default=0)), "host"),
        Memory("activations of the check", round(short * (check.blocks + check.logits)), "host"),
    )
    if files > 1:  # of which one after the other is freed before they are checked
        writing = max(as_stored, checked, key=lambda parts: sum(part.bytes for part in parts))
    else:
        writing = (*as_stored, *checked) if run.on_device else ()
    written = (*held, *writing)
    stages = (
        load,
        *(replace(stage, work=stage.work and stage.work * (shards / processes)) for stage in stages),
        # the model is freed before what was written is read to check it
        Stage(Phase.WRITE, written, Work(stored=checkpoint) + energies),
    )
    if offloads:
        device = config.memory if run.on_device else 0
        stages, room = Offload.of(model, run).stages(stages, device or 0, config.host_limit - program_bytes())
    return Forecast(
        config=config,
        machine=machine,
        stages=stages,
        disk={
            "checkpoint": checkpoint,
            "states of the search": state_bytes(method, outline),
            "tensors at rest": max(stage.bytes("disk") for stage in stages),
            "experts as fused": stored.itemsize * experts if offloads else 0,
        },
        program=program_bytes(),
        room=room,
        processes=processes,
        shards=shards,
        assumed=tuple(_assumed(model, config, run, processes)),
    )


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
    if processes > 1:
        yield f"the {processes} processes do equal parts of the work, and send what they exchange in no time"


def _energies(outline: Outline) -> float:
    """The operations of the mean squared outputs of all layers, of dense weights or of errors (`output_energy`)."""
    return sum(2.0 * layer.shape[1] ** 2 * outline.rows[layer.name] for layer in outline.layers)


def _calibration(run: Workload, examples: int, *, fisher: bool, memory: int | None, positions: int) -> Stage:
    """The passes forward, several if not all sums fit in the memory limit, and backward for the Fisher information.

    Each of the `examples` has so many positions. The activations are not counted.
    """
    outline = run.outline
    each = sums_by_pass(outline.widths, None if memory is None else memory * outline.shards)
    size, stored = max(accumulator_bytes(widths.values()) for widths in each) // outline.shards, _moments_bytes(outline)
    sums = [Memory("sums of moments", size, travels=size * (2.0 * -(-examples // run.batch) + 1))]
    if by_block := run.rests != "device":  # all examples run through one block before the next
        sums = [Memory("sums of a block", 4 * outline.block_sums), Memory("outputs", run.block_outputs(examples))]
    moments = Memory("second moments", stored if by_block or len(each) > 1 else 0, travels=float(stored))
    wide = fisher and run.dtype == torch.float32 != outline.dtype and not run.recompute
    converted = Memory("weights in fp32", 4 * outline.weights if wide else 0)  # until the backward pass
    work = run.pass_work(examples, run.batch, len(each))
    work += Work(products_fp32=2 * positions * examples * outline.moments())
    if fisher:
        work += run.forward * examples + run.pass_work(examples, run.batch, run.recompute + by_block)
        work += run.position_work(examples)
        sums.append(Memory("Fisher information", 8 * sum(outline.rows.values())))
    return Stage(Phase.CALIBRATE, (*sums, moments, converted), work)


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
