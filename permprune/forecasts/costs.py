"""The costs of permuters, registered by class, and of recipes; those of a base class hold for all that derive from it.

A method without a registered function runs as any other, and its time is not known. Last come the costs of choosing the
patterns of a mix (`permprune.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import singledispatch

import torch

from permprune.budget import allocate
from permprune.budget.asked import parse_candidates
from permprune.budget.shares import ATTEMPTS
from permprune.config import PruneConfig
from permprune.forecasts.resources import Memory, Part, Phase, Stage, Work, Workload
from permprune.forecasts.weights import (
    block_training,
    block_update,
    masked_weights,
    teacher_outputs,
    trained_weights,
    training,
    update_work,
)
from permprune.losses.objective import Loss, LossFunction
from permprune.matching.assignment import groups_in, part_count
from permprune.pattern import MIXED
from permprune.permuters import cp, kept, quadratic
from permprune.permuters.base import Identity, Permuter, Random
from permprune.permuters.bundles import BLOCK
from permprune.permuters.cost_matrix import CostMatrixLearner
from permprune.permuters.cp import CP
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.learned import Learned
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.trust_region import Newton, TrustRegion
from permprune.pruning.problem import Outline, Problem
from permprune.recipe import WINDOWS as UPDATED
from permprune.recipe import Recipe
from permprune.updates.methods import ADMM, NoUpdate

TRIED = 1.5
"""Mean number of held-out losses in a round of a trust region: most steps are accepted or halved once."""

START = 2
"""Held-out losses before the first round: of the orders to start from, and of the natural ones."""

MOVED = 280
"""Bytes that `QuadraticModel.swap` reads and writes for each weight: in three passes it computes scores and pruned
parts, from which it takes the placement cost, the gains, and new slopes."""

COUPLED = 3
"""How often a swap multiplies all rows by their correlations, for gains and for the slopes at each candidate step: the
first or second of these is taken."""


@singledispatch
def stages_of(method: Permuter, run: Workload) -> list[Stage]:
    """Return the stages of a search: the memory it holds beside the masked network, and its work.

    By default there is one stage, of which neither is known.
    """
    return [Stage(Phase.SEARCH, (), None, method.name)]


@singledispatch
def state_bytes(method: Permuter | Recipe, outline: Outline) -> int:
    """Estimate of the bytes on disk for the states of a search or a recipe; a new one is written beside the last."""
    return _solution_bytes(outline)


@singledispatch
def proposals(method: TrustRegion, run: Workload) -> tuple[tuple[Memory, ...], Work | None]:
    """Return the memory of the models of the largest problems, and the work of `propose`; by default not known."""
    return quadratic_models(run, run.outline.dtype), None


@stages_of.register(Identity)
@stages_of.register(Random)
def _nothing(method: Identity | Random, run: Workload) -> list[Stage]:
    return []


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
    return [Stage(Phase.SEARCH, (Memory("largest problem's scores", scores),), work, method.name)]


@stages_of.register(CP)
def _cp(method: CP, run: Workload) -> list[Stage]:
    outline = run.outline
    scores = Memory("largest problem's scores", 4 * outline.largest_weights(run.threads))
    tables = sum(pairs_bytes(problem.size, outline.pattern.m) for problem in outline.largest(run.threads))
    return [Stage(Phase.SEARCH, (scores, Memory("tables of pairs", tables)), None, method.name)]


@stages_of.register(Reconstruction)
def _reconstruction(method: Reconstruction, run: Workload) -> list[Stage]:
    def work(channels: int, rows: int, m: int) -> Work:
        slopes = Work(products_fp32=2 * channels**2 * rows)
        swaps = swap_work(channels, rows, m, quadratic.PART) * method.swaps
        return (assignment_work(channels, rows, m) + slopes + swaps) * method.candidates

    weights = run.outline.largest_weights(run.threads)
    scores = 4 * weights + 12 * min(weights, run.threads * BLOCK)  # with the noise of a block
    models = quadratic_models(run, torch.float32)
    losses = run.loss_work((1 + method.shares * (method.candidates - 1)) * run.held_out)
    return [
        Stage(Phase.SCORES, (Memory("largest problem's scores", scores),), method=method.name),
        Stage(Phase.SEARCH, models, run.each_problem(work), method.name),
        Stage(Phase.ACCEPT, run.loss.parts, losses, method.name),
    ]


@stages_of.register(CostMatrixLearner)
def _cost_matrix(method: CostMatrixLearner, run: Workload) -> list[Stage]:
    outline, examples = run.outline, method.examples * run.examples_per_window
    costs = Memory("cost matrices", 16 * _elements(method, outline))  # C, its gradient, two moments
    relaxed = Memory("relaxed weights", 4 * outline.weights)
    gradients = relaxed, run.summed(Part.GRADIENTS, examples, method.steps), *_pass(method.objective, run, examples)
    graph = Memory("largest problem's graph", 32 * outline.largest_weights(1))  # both matrices, permuted, and put back
    relaxing = (costs, Memory(Part.GRADIENTS, 2 * run.gradient_bytes), graph)
    losses = run.loss_work(run.held_out) * (1 + math.ceil(method.steps / method.check))
    return [
        *stages_of(method.start, run),
        Stage(Phase.GRADIENTS, (costs, *gradients), run.gradient_work(examples) * method.steps, method.name),
        Stage(Phase.RELAXATION, relaxing, None, method.name),
        Stage(Phase.ACCEPT, (costs, *_pass(method.objective, run)), losses, method.name),
    ]


@state_bytes.register(CostMatrixLearner)
def _cost_matrix_state(method: CostMatrixLearner, outline: Outline) -> int:
    return _solution_bytes(outline) + 24 * _elements(method, outline)  # C, two moments; twice


@stages_of.register(TrustRegion)
def _trust_region(method: TrustRegion, run: Workload) -> list[Stage]:
    return [*stages_of(method.start, run), *_rounds(method, run)]


def _rounds(method: TrustRegion, run: Workload) -> Iterator[Stage]:
    """Yield the stages of all rounds."""
    rounds, examples = method.rounds, method.examples * run.examples_per_window
    backward = (*_pass(method.objective, run, examples), *masked_weights(run))
    if rounds:
        summed = run.summed(Part.GRADIENTS, examples, rounds)
        yield Stage(Phase.GRADIENTS, (*backward, summed), run.gradient_work(examples) * rounds, method.name)
        models, work = proposals(method, run)
        yield Stage(Phase.PROPOSALS, (*models, _gradients(run)), work and work * rounds, method.name)
    accepting = (*_pass(method.objective, run), *([_gradients(run)] if rounds else []))
    yield Stage(Phase.ACCEPT, accepting, run.loss_work(run.held_out) * (TRIED * rounds + START), method.name)


def changes_of(recipe: Recipe, run: Workload) -> Iterator[Stage]:
    """Yield the stages of a recipe that change weights at the order found; all but the first put the best ones aside.

    The last one is that of their accept tests, which follow each of them.
    """
    size, train, changes = run.outline.dtype.itemsize * run.outline.weights, recipe.train, len(recipe.changes)
    updates, best = not isinstance(recipe.update, NoUpdate), _best_trained(run)
    if updates:
        updated = Memory(Part.UPDATED, size, travels=4.0 * size)  # written, read by blocks, and replaced
        examples = UPDATED * run.examples_per_window
        work = update_work(run, examples) if isinstance(recipe.update, ADMM) else None
        yield Stage(Phase.UPDATE, (updated, *block_update(run, examples)), work)
    if train.block_steps:
        parts, work = block_training(run, train.block_steps)
        yield Stage(Phase.BLOCKS, (*parts, *([best] if updates else [])), work, last=True)
    if train.steps:
        parts, work = training(train, run)
        yield Stage(Phase.TRAINING, (*parts, *([best] if changes > 1 else [])), work, last=True)
    if changes:
        held = [trained_weights(run), *([replace(best, travels=0.0)] if changes > 1 else [])]
        losses = run.loss_work(run.held_out) * (START + changes)
        yield Stage(Phase.ACCEPT, (*_pass(train.objective, run), *held), losses)


def _gradients(run: Workload) -> Memory:
    """The memory of the mean gradients."""
    return Memory(Part.GRADIENTS, run.gradient_bytes)


def _best_trained(run: Workload) -> Memory:
    """The memory of the best weights so far, which are put aside, and read at the end."""
    trained = trained_weights(run)
    return replace(trained, name=Part.BEST_TRAINED, travels=2.0 * trained.bytes)


@state_bytes.register(TrustRegion)
def _trust_region_state(method: TrustRegion, outline: Outline) -> int:
    orders = 8 * sum(problem.size for problem in outline.problems) * method.rounds
    return _solution_bytes(outline) + 2 * orders  # the old one is kept until the new one is written


@state_bytes.register(Recipe)
def _recipe_state(recipe: Recipe, outline: Outline) -> int:
    weights, trains = outline.dtype.itemsize * outline.weights, recipe.train.steps > 0
    states = weights * (len(recipe.changes) - trains)  # those of the update and of the blocks
    if trains:
        states += weights + weights * outline.pattern.n // outline.pattern.m  # and first moments of kept ones
        states += 4 * sum(sum(layer.shape) for layer in outline.layers)  # and second ones
    return state_bytes(recipe.order, outline) + 2 * states


@proposals.register(Newton)
def _newton(method: Newton, run: Workload) -> tuple[tuple[Memory, ...], Work]:
    work = run.each_problem(lambda channels, rows, m: swap_work(channels, rows, m, quadratic.PART) * method.swaps)
    coupled = run.correlated(lambda channels, rows: COUPLED * channels * rows) * method.swaps
    return quadratic_models(run, run.outline.dtype, quadratic.PART), work + coupled


@proposals.register(Learned)
def _learned(method: Learned, run: Workload) -> tuple[tuple[Memory, ...], Work]:
    def work(channels: int, rows: int, m: int) -> Work:
        part = method.part_size(channels, run.outline.pattern)
        return swap_work(channels, rows, m) * (method.steps * part / channels)

    return quadratic_models(run, run.outline.dtype), run.each_problem(work)


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


def _pass(objective: Loss | LossFunction, run: Workload, examples: int = 0) -> tuple[Memory, ...]:
    """The memory of a gradient on this number of examples, or of the accept test."""
    passing = run.gradient.parts if examples else (*run.loss.parts, run.packed)
    return (*teacher_outputs(objective, run, examples), *passing)


def quadratic_models(run: Workload, slopes: torch.dtype, part: int | None = None) -> tuple[Memory, ...]:
    """Return the memory of the quadratic models of the largest problems, one on each thread.

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
    size = slopes.itemsize * outline.largest_weights(run.threads)
    return Memory(Part.SLOPES, size), Memory(Part.MODEL, sum(rest))


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


def stages_of_mix(config: PruneConfig, run: Workload) -> list[Stage]:
    """Return the stage in which patterns are chosen; none if there is one pattern."""
    if config.pattern != MIXED:
        return []
    candidates = len(parse_candidates(config.candidates))
    examples, times = allocate.EXAMPLES * run.examples_per_window, len(allocate.differentiated(candidates))
    work = [run.gradient_work(examples) * times, run.loss_work(run.held_out) * (candidates + len(allocate.POINTS) + 2)]
    work += [stage.work for stage in stages_of(allocate.START, run) if stage.work is not None]
    parts = (*run.gradient.parts, run.summed(Part.GRADIENTS, examples, times))
    return [Stage(Phase.PATTERNS, parts, sum(work, Work()))]


def stages_of_limit(config: PruneConfig, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stage of the other runs of a limit of the loss, given the `stages` of one; none without a limit.

    What patterns cost is measured once for all of them.
    """
    if config.max_loss is None:
        return []
    works = [stage.work for stage in stages if stage.phase != Phase.PATTERNS]
    known = [work for work in works if work is not None]
    total = sum(known, Work()) * (ATTEMPTS - 1) if len(known) == len(works) else None
    return [Stage(Phase.OTHER_SHARES, max(stages, key=lambda stage: stage.bytes()).parts, total)]
