"""What follows the rounds of a `TrustRegion` search: stages that change masks, and the weights that are kept."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

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
    changes = (
        ("compensation", method.compensate, partial(compensate, landscape, examples=4 * method.examples)),
        ("blocks", method.block_steps, partial(train_blocks, landscape, steps=method.block_steps)),
        ("training", method.trains_all, partial(_train_all, method, landscape)),
    )
    before = [method.refine]  # what the weights that a change starts from depend on, beside the points of the curve
    for what, asked, change in changes:
        before.append(asked)
        if asked and (left := _time_left(landscape, state, what)) > 0:
            stage(method.stage(what))
            saved = Resumable(checkpoint, f"{method.name}.{what}", [len(state.curve), *before])
            state = replace(state, seconds=state.seconds + saved.before)
            state = state.timed(partial(change, limit=left, saved=saved))
    return state, landscape.network.bits if method.refine or method.compensate else {}


def _time_left(landscape: Landscape, state: TrustRegionState, what: str) -> float:
    """The seconds that are left of the time limit of a run; if there are none, logs that `what` is left out."""
    minutes = landscape.run.minutes
    left = math.inf if minutes is None else 60 * minutes - state.seconds
    if left <= 0:
        log.warning("%s: no time is left of --minutes %g", what, minutes)
    return left


def _train_all(
    method: TrustRegion, landscape: Landscape, state: TrustRegionState, *, limit: float, saved: Resumable
) -> TrustRegionState:
    """Train the weights that are kept for the steps of the method, or up to the limit (see `train_weights`)."""
    schedules = [counted(method.train_steps)] if method.train_steps else []
    schedules += [] if limit == math.inf else [timed(limit)]
    network, schedule, rate = landscape.network, first_ended(*schedules), method.rate
    loss, examples = landscape.loss.for_training(network.task), method.step_examples
    weights = train_weights(network, landscape.run, loss, schedule, examples=examples, rate=rate, saved=saved)
    state, kept = keep_if_better(landscape, state, weights, "training")
    if not kept:
        log.warning(
            "training did not lower the held-out loss (%.4f): weights are as before; give a lower rate, as in "
            "%s:rate=%g",
            *(state.best, method.name, rate / 4),
        )
    return state
