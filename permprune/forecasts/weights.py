"""The costs of what changes weights: training, compensation, and solving int4 values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from permprune.forecasts.resources import Memory, Part, Work, Workload
from permprune.inference.solved import SWEEPS
from permprune.inference.solving import PARTS, STEPS
from permprune.losses.objective import Loss, LossFunction, as_loss
from permprune.models.layers import Layer
from permprune.training.blocks import PASSES
from permprune.training.train import WINDOWS, Training
from permprune.updates.methods import ADMM, WIDE

STEPPED = 15
"""How often a step of training reads or writes each weight: to mask and convert it, for both models' products, for its
gradient, and for Adam."""

UPDATE_COPIES = 9.5
"""The weight of a layer, and what ADMM computes of its size at a time, beside matrices of second moments."""

UPDATE_PASSES = 20
"""How often an iteration of ADMM reads or writes each weight, beside the product."""

COMPARED = 2
"""Passes of a block beside its updating, to compare what it computes with values of int4 and without."""


def block_update(run: Workload, examples: int) -> tuple[Memory, ...]:
    """The memory of `LayerUpdate.run` with ADMM: a block's inputs, second moments and weights, and a layer's."""
    blocks = _block_weights(run)

    def in_hand(layer: Layer) -> float:
        channels, weights = layer.shape[1], layer.shape.numel()
        return max(4 * channels**2 + weights, 3 * channels**2 + UPDATE_COPIES * weights)

    size = max(blocks) + max(map(in_hand, run.outline.layers)) + run.outline.block_sums
    return Memory(Part.ACTIVATIONS, run.block_outputs(examples)), Memory("update of a block", round(4 * size))


def update_work(run: Workload, examples: int) -> Work:
    """An inverse costs about as much as an iteration, and of wide layers only the last iteration is in fp32."""
    method = ADMM()

    def update(channels: int, rows: int, m: int) -> Work:
        product, wide = 2.0 * channels**2 * rows, channels >= WIDE and run.dtype == torch.bfloat16
        moved = UPDATE_PASSES * 4.0 * channels * rows * method.iterations
        narrow = (method.iterations - 1) * product if wide else 0.0
        return Work(products=narrow, products_fp32=(method.iterations + 1) * product - narrow, moved=moved)

    return _block_by_block(run, examples, update)


def solving(run: Workload, examples: int) -> tuple[Memory, Work]:
    """The memory and the work of solving int4 values, and of training one block after the other through them.

    An inverse and GPTQ's order cost about as much as a pass of coordinate descent each. A block in training has its
    weights in fp32, as solved, in training and as stored, a gradient and Adam's two moments.
    """
    solved = _block_by_block(
        run, examples, lambda channels, rows, m: Work(products_fp32=2.0 * channels**2 * rows * (SWEEPS + 2))
    )
    trained = run.forward * (3 * STEPS * math.ceil(examples / PARTS))
    trained += Work(moved=STEPPED * 4.0 * run.outline.weights * STEPS)
    memory = Memory("int4 values of a block", 24 * max(_block_weights(run)) + 3 * run.block_outputs(examples))
    return memory, solved + run.pass_work(examples, examples, COMPARED) + trained


def _block_weights(run: Workload) -> list[int]:
    return [sum(layer.shape.numel() for layer in block) for block in run.outline.blocks]


def _block_by_block(run: Workload, examples: int, update: Callable[[int, int, int], Work]) -> Work:
    """Blocks run twice, before and after the update of their layers, which needs second moments."""
    moments = Work(products_fp32=2 * run.positions * examples * run.outline.moments())
    return run.pass_work(examples, examples, 2) + moments + run.each_problem(update)


def training(method: Training, run: Workload) -> tuple[tuple[Memory, ...], Work]:
    """The memory and the work of `train_weights`.

    Each batch of a step reads the weights, once more with `recompute`, and a step reads and writes them and their
    moments; there are sums of gradients for several batches only. A step makes passes of the dense model and, as of a
    gradient but without covariance, of the pruned one. `carrying` its weights is left to the memory.
    """
    outline, steps, examples = run.outline, method.steps, WINDOWS * run.examples_per_window
    batches = math.ceil(examples / run.batch)
    reads = (2 if run.recompute else 1) * batches + 2
    masked = masked_weights(run) if outline.dtype != run.dtype else ()  # else those in training run
    weights = outline.dtype.itemsize * outline.weights
    moments = weights * outline.pattern.n // outline.pattern.m
    parts = [
        Memory(Part.IN_TRAINING, weights, travels=float(weights * reads * steps)),
        Memory(Part.ADAM, moments, travels=2.0 * moments * steps), *run.gradient.parts, *masked,
    ]  # fmt: skip
    if batches > 1:
        parts.append(run.summed(Part.GRADIENT_SUMS, examples - run.batch, steps))
    if run.on_device:
        parts.append(Memory("tensor that is saved", weights // len(outline.sites), "host"))
    passes = run.pass_work(examples, run.batch) + run.forward * ((4 if run.recompute else 3) * examples)
    work = (passes + _moved_by_step(run)) * steps
    return (*parts, *teacher_outputs(method.objective, run, examples, training=True)), work


def block_training(run: Workload, steps: int) -> tuple[tuple[Memory, ...], Work]:
    """The memory and the work of `train_blocks`: of each block, passes of the dense and the pruned one, and steps."""
    outline, examples = run.outline, steps * run.examples_per_window
    blocks = _block_weights(run)
    size, share = outline.dtype.itemsize * max(blocks), max(blocks) / sum(blocks)
    parts = (
        trained_weights(run),
        Memory("outputs of blocks", 3 * run.block_outputs(math.ceil(examples / PASSES))),
        Memory(Part.IN_TRAINING, size),
        Memory(Part.ADAM, round(size * outline.pattern.density)),
        *(replace(part, bytes=round(part.bytes * share)) for part in run.gradient.parts),
    )
    batch = min(run.batch, run.examples_per_window)
    work = run.pass_work(examples, batch) + run.forward * (2 * examples) + run.pass_work(examples / PASSES, batch, 2)
    return parts, work + _moved_by_step(run) * steps


def _moved_by_step(run: Workload) -> Work:
    return Work(moved=STEPPED * run.outline.dtype.itemsize * run.outline.weights)


def trained_weights(run: Workload) -> Memory:
    """The memory of weights that were trained."""
    return Memory(Part.TRAINED, run.outline.dtype.itemsize * run.outline.weights)


def masked_weights(run: Workload) -> tuple[Memory, ...]:
    """The memory of the masked weights, which live until the backward pass; `run.gradient` counts those in bf16."""
    if run.dtype != torch.float32 or run.recompute:
        return ()
    return (Memory("masked weights", 4 * run.outline.weights),)


def teacher_outputs(
    objective: Loss | LossFunction, run: Workload, examples: int, *, training: bool = False
) -> tuple[Memory, ...]:
    """The dense model's outputs that the search holds: those for the accept test, and for `examples` of a gradient.

    The distances of a batch are computed in fp32, of both models' outputs. In `training` the blocks' outputs are
    compared as well where few positions have labels (`Objective.for_training`).
    """
    if not (as_loss(objective).compares_blocks or (training and not run.labelled)):
        return ()
    distances = 8 * run.gradient.outputs // run.dtype.itemsize if examples else 0
    outputs = Memory("dense model's outputs", (run.held_out + examples) * run.gradient.outputs // run.batch, "host")
    return (outputs, Memory("distances to the dense model", distances))
