"""A mix with the fewest weights that loses no more than a limit, by the measure of the evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

from permprune.budget.asked import density_of, parse_candidates
from permprune.budget.shares import next_share
from permprune.checkpoints.record import Attempt
from permprune.engine.measuring import Meter
from permprune.engine.session import Session
from permprune.errors import PermpruneError
from permprune.evaluation.result import NotFinite, Result
from permprune.permuters.base import Callback, Permuter
from permprune.system import stages
from permprune.system.progress import log, stage

MOST = 0.98
"""The largest share of the weights that is tried."""


def keep_within(session: Session, method: Permuter, callbacks: tuple[Callback, ...] = ()) -> None:
    """Let the session's weights have the mix with the fewest weights that keeps to the `max_loss` of their config.

    Each attempt is a whole run: patterns for a share of the weights, a search, an update, and a measurement on the
    first half of the evaluation data (`Session.choosing`). The fewest weights within the limit there are confirmed on
    the other half, which no choice has seen; if they lose more, that loss counts, and the search goes on with larger
    shares. The record tells of it. If none is confirmed, a warning tells what the best one loses.
    Raises `PermpruneError` if no share that was tried is within the limit on the first half.
    """
    weights, choosing = session.weights, session.choosing
    assert choosing is not None
    limit, attempts = weights.plan.config.max_loss, list[Attempt]()
    assert limit is not None
    with weights.dense():
        dense = choosing()[0], session.measure()[0]
    for one in dense:
        loss_of(one, one)  # refuses one that is 0 before anything is searched

    def lost_at(share: float, meter: Meter, beside: Result) -> tuple[float, float]:
        """Return the value and the loss of a run that keeps a share of the weights, measured beside the dense model."""
        if weights.mixed is None or weights.mixed_at != share:
            weights.mix(share)
            weights.search(method, replace(weights.plan.run, callbacks=callbacks))
        stage(stages.MEASURE)
        try:
            value = meter()[0].value
        except NotFinite:
            value = math.inf
        return value, loss_of(replace(beside, value=value), beside)

    densities = [density_of(one) for one in parse_candidates(weights.plan.config.candidates)]
    least, most = densities[0], min(MOST, densities[-1])
    tried = dict[float, float]()
    while True:
        while (share := next_share([*tried.items()], limit, least, most)) is not None:
            value, loss = lost_at(share, choosing, dense[0])
            log.info("keeping %.3f of the weights: %s %.4g, %.2f %% lost", share, dense[0].metric, value, 100 * loss)
            tried[share] = loss
            attempts.append(Attempt(share, value))
        share = min((share for share, loss in tried.items() if loss <= limit), default=None)
        if share is None:
            break
        value, loss = lost_at(share, session.measure, dense[1])
        attempts = [replace(one, confirmed=value) if one.keep == share else one for one in attempts]
        if loss <= limit:
            break
        log.warning("keeping %.2f of the weights loses %.2f %% on the other half of the data", share, 100 * loss)
        tried[share] = loss
    if all(one.confirmed is None for one in attempts):
        share = max(tried)
        raise PermpruneError(
            f"no mix that was tried loses at most {100 * limit:g} %: with {share:.2f} of the weights it is "
            f"{100 * tried[share]:.3g} %; allow more, take a larger --effort, or denser --candidates"
        )
    if share is None:
        share = min((one.keep for one in attempts if one.confirmed is not None), key=tried.__getitem__)
        lost_at(share, session.measure, dense[1])
        log.warning(
            "no mix that was tried loses at most %g %% on both halves of the data: this one, with %.2f of the weights, "
            "loses least, %.3g %%",
            *(100 * limit, share, 100 * tried[share]),
        )
    assert weights.mixed is not None
    weights.mixed = replace(weights.mixed, attempts=attempts)


def loss_of(result: Result, dense: Result) -> float:
    """Return what a result loses, as a share of the dense model's. Raises `PermpruneError` if that is 0."""
    if not dense.value:
        raise PermpruneError(
            f"the dense model's {dense.metric} is 0, of which no share can be lost: give keep or bytes"
        )
    change = dense.value - result.value if dense.metric.higher_is_better else result.value - dense.value
    return change / abs(dense.value) if math.isfinite(change) else math.inf
