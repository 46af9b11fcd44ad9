"""The costs of permuters and updates, registered by class; those of a base class hold for all that derive from it.

A method without a registered function runs as any other, and its time is not known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch

from permprune.forecasts.resources import Memory, Stage, Work, Workload
from permprune.forecasts.weights import (
    STEPPED,
    block_training,
    block_update,
    compensation_work,
    masked_weights,
    solving_work,
    teacher_outputs,
    trained_weights,
    training_memory,
    update_share,
)
from permprune.matching.assignment import groups_in, part_count
from permprune.permuters import cp, kept, quadratic
from permprune.permuters.base import Permuter
from permprune.permuters.bundles import BLOCK
from permprune.permuters.cost_matrix import CostMatrixLearner
from permprune.permuters.cp import CP
from permprune.permuters.identity import Identity, Random
from permprune.permuters.iterate import Iterative
from permprune.permuters.learned import Learned
from permprune.permuters.newton import Newton
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.ria import RIAPermuter
from permprune.permuters.trust_region import TrustRegion
from permprune.pruning.problem import Outline, Problem
from permprune.training.int4 import SOLVED
from permprune.updates.base import NoUpdate, Update

TRIED = 1.5
"""Mean number of held-out losses in a round of a trust region: most steps are accepted or halved once."""

START = 2
"""Held-out losses before the first round: of the orders to start from, and of the natural ones."""

TRIED_SHARES = 3
"""The same in a round of refinement."""

MOVED = 280
"""Bytes that `QuadraticModel.swap` reads and writes for each weight: in three passes it computes scores and pruned
parts, from which it takes the placement cost, the gains, and new slopes."""

COUPLED = 3
"""How often a swap multiplies all rows by their correlations, for gains and for the slopes at each candidate step: the
first or second of these is taken."""


@singledispatch
def stages_of(method: Permuter | Update, run: Workload) -> list[Stage]:
    """Return the stages of a search or an update: the memory it holds beside the masked network, and its work.

    By default there is one stage, of which neither is known.
    """
    return [Stage(method.name, (), None)]


@singledispatch
def state_bytes(method: Permuter, outline: Outline) -> int:
    """Estimate of the bytes on disk for the states of a search; a new state is written beside the previous one."""
    return _solution_bytes(outline)


@singledispatch
def proposals(method: TrustRegion, run: Workload) -> tuple[int, Work | None]:
    """Return the bytes of the models of the largest problems, and the work of `propose`; by default it is not known."""
    return model_bytes(run, run.outline.dtype), None


@stages_of.register(NoUpdate)
@stages_of.register(Identity)
@stages_of.register(Random)
def _nothing(method: NoUpdate | Identity | Random, run: Workload) -> list[Stage]:
    return []


@stages_of.register(Update)
def _update(method: Update, run: Workload) -> list[Stage]:
    updated = Memory("updated weights", 2 * run.outline.dtype.itemsize * run.outline.weights)  # for both masks
    return [
        Stage("update", (updated, *block_update(run, run.measured)), None),
        Stage("update: accept", (updated, update_share(run), *run.loss.parts), None),
    ]


@stages_of.register(RIAPermuter)
def _ria(method: RIAPermuter, run: Workload) -> list[Stage]:
    outline, scores, read = run.outline, 20 * kept.READ * run.threads, 0.0  # those of a block
    layer = max(layer.shape.numel() for layer in outline.layers)
    for problem in outline.largest(run.threads):
        weights = problem.size * outline.rows_of(problem)
        scores += 4 * weights if weights <= kept.HELD else 12 * layer  # with its weights in fp32, and transposed
    for problem in outline.problems:
        weights = problem.size * outline.rows_of(problem)
        read += weights * (1 if weights <= kept.HELD else 1 + kept.PASSES * outline.pattern.m)
    work = run.each_problem(assignment_work) + run.carrying(read * outline.dtype.itemsize)
    return [Stage(method.name, (Memory("largest problem's scores", scores),), work)]


@stages_of.register(CP)
def _cp(method: CP, run: Workload) -> list[Stage]:
    outline = run.outline
    scores = Memory("largest problem's scores", 4 * outline.largest_weights(run.threads))
    tables = sum(pairs_bytes(problem.size, outline.pattern.m) for problem in outline.largest(run.threads))
    return [Stage(method.name, (scores, Memory("tables of pairs", tables)), None)]


@stages_of.register(Reconstruction)
def _reconstruction(method: Reconstruction, run: Workload) -> list[Stage]:
    def work(channels: int, rows: int, m: int) -> Work:
        slopes = Work(products_fp32=2 * channels**2 * rows)
        swaps = swap_work(channels, rows, m, quadratic.PART) * method.swaps
        return (assignment_work(channels, rows, m) + slopes + swaps) * method.candidates

    weights = run.outline.largest_weights(run.threads)
    scores = 4 * weights + 12 * min(weights, run.threads * BLOCK)  # with the noise of a block
    losses = 1 + method.shares * (method.candidates - 1)
    return [
        Stage(f"{method.name}: scores", (Memory("largest problem's scores", scores),)),
        Stage(method.name, model_parts(run, torch.float32, model_bytes(run, torch.float32)), run.each_problem(work)),
        Stage(f"{method.name}: accept", run.loss.parts, run.loss_work(losses * run.held_out)),
    ]


@stages_of.register(CostMatrixLearner)
def _cost_matrix(method: CostMatrixLearner, run: Workload) -> list[Stage]:
    outline, examples = run.outline, method.examples * run.examples_per_window
    costs = Memory("cost matrices", 16 * _elements(method, outline))  # C, its gradient, two moments
    relaxed = Memory("relaxed weights", 4 * outline.weights)
    gradients = relaxed, run.summed("gradients", examples, method.steps), *_pass(method, run, examples)
    graph = Memory("largest problem's graph", 32 * outline.largest_weights(1))  # both matrices, permuted, and put back
    losses = run.loss_work(run.held_out) * (1 + math.ceil(method.steps / method.check))
    return [
        *stages_of(method.start, run),
        Stage(f"{method.name}: gradients", (costs, *gradients), run.gradient_work(examples) * method.steps),
        Stage(f"{method.name}: relaxation", (costs, Memory("gradients", 2 * run.gradient_bytes), graph), None),
        Stage(f"{method.name}: accept", (costs, *_pass(method, run)), losses),
    ]


@state_bytes.register(CostMatrixLearner)
def _cost_matrix_state(method: CostMatrixLearner, outline: Outline) -> int:
    return _solution_bytes(outline) + 24 * _elements(method, outline)  # C, two moments; twice


@stages_of.register(TrustRegion)
def _trust_region(method: TrustRegion, run: Workload) -> list[Stage]:
    outline, examples = run.outline, method.examples * run.examples_per_window
    gradients, (model, proposing) = Memory("gradients", run.gradient_bytes), proposals(method, run)

    def stage(what: str, *parts: Memory, work: Work | None, summed: int = 0, times: float = method.rounds) -> Stage:
        held = run.summed("gradients", summed, times)
        return Stage(f"{method.name}: {what}", (*parts, held), None if work is None else work * times)

    losses = TRIED * method.rounds + START + method.compensate + bool(method.block_steps) + method.trains_at_end
    backward = (*_pass(method, run, examples), *masked_weights(run))
    batch = method.step_examples * run.examples_per_window
    trained = trained_weights(run)
    best = replace(trained, name="best trained weights", travels=2.0 * trained.bytes)  # put aside, and read at the end
    during = [*([gradients] if method.rounds else []), *([trained] if method.tune else [])]
    changed = bool(method.tune) + method.compensate + bool(method.block_steps)
    after = [trained] if changed or method.trains_at_end else []
    after += [replace(best, travels=0.0)] if changed + method.trains_at_end > 1 else []
    held = max(during, after, key=lambda parts: sum(part.bytes for part in parts))
    accept = Stage(f"{method.name}: accept", (*_pass(method, run), *held), run.loss_work(run.held_out) * losses)
    step = run.step_work(batch) + Work(moved=STEPPED * outline.dtype.itemsize * outline.weights)
    rounds = [accept]
    if method.rounds:
        rounds = [
            stage("gradients", *backward, work=run.gradient_work(examples), summed=examples),
            stage("proposals", *model_parts(run, outline.dtype, model), work=proposing),
            accept,
        ]
    if method.rounds and method.tune:
        steps = method.tune * max(0, method.rounds - method.wait)
        training = training_memory(method, run, batch, steps)
        rounds.append(stage("training", *training, best, work=step * (steps / method.rounds)))
    if method.refine:
        work = run.gradient_work(2 * examples) + run.loss_work(run.held_out) * TRIED_SHARES
        rounds.append(stage("refinement", *backward, work=work, summed=2 * examples, times=method.refine))
    if method.compensate:
        size = outline.dtype.itemsize * outline.weights  # written, read by blocks that run again, and replaced
        updated = Memory("compensated weights", size, travels=4.0 * size)
        parts = (updated, *([trained_weights(run)] if method.tune else []), *block_update(run, 4 * examples))
        rounds.append(Stage(f"{method.name}: compensation", parts, compensation_work(run, 4 * examples)))
    if method.block_steps:
        parts, work = block_training(run, method.block_steps)
        rounds.append(Stage(f"{method.name}: blocks", (*parts, *([best] if changed > 1 else [])), work, last=True))
    if method.trains_at_end:
        counted = step * method.train_steps if method.train_steps else None
        training = training_memory(method, run, batch, method.train_steps)
        if method.int4:
            training = (*training, Memory("int4 weights", outline.dtype.itemsize * outline.weights))
            counted = counted and counted + solving_work(run, SOLVED * run.examples_per_window)
        if changed:
            training = (*training, best)
        rounds.append(Stage(f"{method.name}: training at the end", training, counted, last=True))
    return [*stages_of(method.start, run), *rounds]


@state_bytes.register(TrustRegion)
def _trust_region_state(method: TrustRegion, outline: Outline) -> int:
    weights = outline.dtype.itemsize * outline.weights if method.trains else 0
    training = weights + weights * outline.pattern.n // outline.pattern.m  # and first moments of kept ones
    training += 4 * sum(sum(layer.shape) for layer in outline.layers) if method.trains else 0  # and second ones
    training += outline.weights // 32 if method.int4 else 0  # scales
    training += weights if method.block_steps else 0
    masks = outline.weights // 8 if method.refine or method.compensate else 0
    orders = 8 * sum(problem.size for problem in outline.problems) * method.rounds
    states = 2 * (orders + weights + masks + training)  # the old one is kept until the new one is written
    return _solution_bytes(outline) + states + weights + masks  # the solution has them, too


@proposals.register(Newton)
def _newton(method: Newton, run: Workload) -> tuple[int, Work]:
    work = run.each_problem(lambda channels, rows, m: swap_work(channels, rows, m, quadratic.PART) * method.swaps)
    coupled = run.correlated(lambda channels, rows: COUPLED * channels * rows) * method.swaps
    return model_bytes(run, run.outline.dtype, quadratic.PART), work + coupled


@proposals.register(Learned)
def _learned(method: Learned, run: Workload) -> tuple[int, Work]:
    def work(channels: int, rows: int, m: int) -> Work:
        part = method.part_size(channels, run.outline.pattern)
        return swap_work(channels, rows, m) * (method.steps * part / channels)

    return model_bytes(run, run.outline.dtype), run.each_problem(work)


@stages_of.register(Learned)
def _learned_stages(method: Learned, run: Workload) -> list[Stage]:
    costs = Memory("cost matrices", 4 * _elements(method, run.outline), "host")
    return [stage.beside([costs]) for stage in _trust_region(method, run)]


@state_bytes.register(Learned)
def _learned_state(method: Learned, outline: Outline) -> int:
    return _trust_region_state(method, outline) + 8 * _elements(method, outline)


def _solution_bytes(outline: Outline) -> int:
    """The bytes of the orders of a solution and of a state."""
    return 2**20 + 64 * sum(problem.size for problem in outline.problems)


def _elements(method: CostMatrixLearner | Learned, outline: Outline) -> int:
    """The elements of all cost matrices."""
    return sum(problem.size * method.part_size(problem.size, outline.pattern) for problem in outline.problems)


def _pass(method: Iterative[Any], run: Workload, examples: int = 0) -> tuple[Memory, ...]:
    """The memory of a gradient on this number of examples, or of the accept test."""
    passing = run.gradient.parts if examples else (*run.loss.parts, run.packed)
    return (*teacher_outputs(method, run, examples), *passing)


def model_bytes(run: Workload, slopes: torch.dtype, part: int | None = None) -> int:
    """Return the bytes that the quadratic models of the largest problems hold, one on each thread.

    These are the slopes, of type `slopes`, and of a block of rows the weights and scores (of a small problem, those of
    all rows), the pruned parts before and after a step, their difference, and two matrices that are computed from it;
    and the second moments that one layer reads, with a part of them in another order. Of these, only those inside parts
    of `part` channels are read, if given. They may be larger in a problem with fewer slopes.
    """
    outline = run.outline
    largest = max(outline.rows[layer.name] * layer.weight.shape[1] for layer in outline.layers)

    def beside_slopes(problem: Problem) -> int:
        weights = problem.size * outline.rows_of(problem)
        block = min(weights, largest, BLOCK)
        width = max(outline.widths[one.site] for one in problem.parts)
        return 20 * block + 8 * (weights if weights <= BLOCK else block) + 6 * width * min(width, part or width)

    rest = sorted(map(beside_slopes, outline.problems))[-run.threads :]
    return slopes.itemsize * outline.largest_weights(run.threads) + sum(rest)


def model_parts(run: Workload, slopes: torch.dtype, model: int) -> tuple[Memory, ...]:
    """The parts of the models of the largest problems, of so many bytes, whose slopes have type `slopes`."""
    rest = slopes.itemsize * run.outline.largest_weights(run.threads)
    return Memory("slopes of the largest problem", rest), Memory("largest problem's model", model - rest)


def pairs_bytes(channels: int, m: int) -> int:
    """Return the bytes of the tables of `cp`: the groups, gain and choice of each pair, and of an escape the last two.

    `cp.CHUNK` groups at a time are compared with all others, for every way to exchange channels.
    """
    groups = channels // m
    if channels > cp.WIDE:
        return 0
    exchanges = sum(math.comb(m, count) ** 2 for count in ((1, 2) if m == 4 else (1,)))
    return 48 * groups**2 + 16 * cp.CHUNK * groups * exchanges


def swap_work(channels: int, rows: int, m: int, part: int | None = None) -> Work:
    """Return the work of a swap in each group: placement cost, gain of each pair, and change of all slopes, once.

    The groups are divided into parts of at most `part` channels, if it is given.
    """
    parts = part_count(channels // m, groups_in(part or channels, m))
    comparisons = (channels // m) ** 2 / parts
    products = 4 * m * channels + 2 * channels**2 / parts
    return Work(comparisons=comparisons * rows, products_fp32=products * rows, moved=MOVED * channels * rows)


def assignment_work(channels: int, rows: int, m: int) -> Work:
    """Return the work of `ria_order`: a comparison for each slot, row, and group with each other of its part."""
    groups = channels // m
    return Work(comparisons=kept.PASSES * m * groups**2 / part_count(groups, groups_in(kept.PART, m)) * rows)
