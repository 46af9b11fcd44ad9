"""What follows the rounds of a `TrustRegion` search: stages that change masks, and the weights that are kept."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from permprune.permuters.base import TRAINING
from permprune.permuters.block_tuning import train_blocks
from permprune.permuters.iterate import Landscape
from permprune.permuters.refinement import compensate, refine_masks
from permprune.permuters.trust_region_state import TrustRegionState
from permprune.permuters.tuning import counted, first_ended, keep_if_better, timed, train_weights
from permprune.system.progress import log, stage
from permprune.system.search_state import Resumable

if TYPE_CHECKING:
    from permprune.permuters.trust_region import TrustRegion


def after_rounds(
    method: TrustRegion, landscape: Landscape, state: TrustRegionState
) -> tuple[TrustRegionState, dict[str, Tensor]]:
    """Make the stages that the method asks for, from a state that the network shows.

    Returns the state, and the masks if they are others than those of the scores.
    """
    checkpoint = method.checkpoint(landscape.run)
    if method.refine:
        stage(method.stage("refinement"))
        saved = Resumable(checkpoint, f"{method.name}.refinement", state.number)
        limit, examples = method.time_limit(landscape.run), 2 * method.examples
        state = refine_masks(landscape, state, rounds=method.refine, examples=examples, limit=limit, saved=saved)
    if method.compensate and (left := _time_left(landscape, state, "compensation")) > 0:
        stage(method.stage("compensation"))
        saved = Resumable(checkpoint, f"{method.name}.compensation", [len(state.curve), method.refine])
        state = state.timed(partial(compensate, landscape, examples=4 * method.examples, limit=left, saved=saved))
    if method.block_steps and (left := _time_left(landscape, state, "blocks")) > 0:
        stage(method.stage("blocks"))
        saved = Resumable(checkpoint, f"{method.name}.blocks", _stages_before(method, state))
        state = state.timed(partial(train_blocks, landscape, steps=method.block_steps, limit=left, saved=saved))
    bits = landscape.network.bits if method.refine or method.compensate else {}
    if method.trains_at_end and (left := _time_left(landscape, state, "training")) > 0:
        stage(method.stage("training"))
        state = state.timed(partial(_train_at_end, method, landscape, left))
    return state, bits


def _stages_before(method: TrustRegion, state: TrustRegionState) -> list[int]:
    """What the weights that a training starts from depend on: each follows more points of the curve."""
    return [len(state.curve), method.refine, method.compensate, method.block_steps]


def _time_left(landscape: Landscape, state: TrustRegionState, what: str) -> float:
    """The seconds that are left of the time limit of a run; if there are none, logs that `what` is left out."""
    minutes = landscape.run.minutes
    left = math.inf if minutes is None else 60 * minutes - state.seconds
    if left <= 0:
        log.warning("%s: no time is left of --minutes %g", what, minutes)
    return left


def _train_at_end(method: TrustRegion, landscape: Landscape, left: float, state: TrustRegionState) -> TrustRegionState:
    """Train the weights that are kept for the steps and the seconds that are `left` (see `train_weights`)."""
    schedules = [counted(method.train_steps)] if method.train_steps else []
    schedules += [] if left == math.inf else [timed(left)]
    network, run = landscape.network, landscape.run
    saved = Resumable(method.checkpoint(run), method.name + TRAINING, _stages_before(method, state))
    state = replace(state, seconds=state.seconds + saved.before)
    loss, schedule = landscape.loss.for_training(network.task), first_ended(*schedules)
    examples, rate = method.step_examples, method.rate
    weights = train_weights(network, run, loss, schedule, examples=examples, rate=rate, saved=saved)
    state, kept = keep_if_better(landscape, state, weights, "training")
    if not kept:
        log.warning(
            "training did not lower the held-out loss (%.4f): weights are as before; give a lower rate, as in "
            "%s:rate=%g",
            state.best,
            method.name,
            rate / 4,
        )
    return state
