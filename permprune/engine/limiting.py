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
    attempts = _Attempts(session, method, callbacks)
    while (share := attempts.fewest()) is not None and not attempts.confirm(share):
        pass
    if share is None:
        attempts.take_best()
    assert session.weights.mix is not None
    session.weights.mix = replace(session.weights.mix, attempts=attempts.made)


class _Attempts:
    """The runs that are tried; `lost` are their losses by the share of the weights that they keep."""

    def __init__(self, session: Session, method: Permuter, callbacks: tuple[Callback, ...]) -> None:
        self.session, self.weights, self.method, self.callbacks = session, session.weights, method, callbacks
        choosing, limit = session.choosing, self.weights.plan.config.max_loss
        assert choosing is not None and limit is not None
        self.choosing, self.limit = choosing, limit
        with self.weights.dense():
            self.dense = choosing()[0], session.measure()[0]
        for one in self.dense:
            loss_of(one, one)  # refuses one that is 0 before anything is searched
        densities = [density_of(one) for one in parse_candidates(self.weights.plan.config.candidates)]
        self.least, self.most = densities[0], min(MOST, densities[-1])
        self.made, self.lost = list[Attempt](), dict[float, float]()

    def fewest(self) -> float | None:
        """Try shares, and return the smallest one that is within the limit on the first half; None if there is none."""
        metric = self.dense[0].metric
        while (share := next_share([*self.lost.items()], self.limit, self.least, self.most)) is not None:
            value, self.lost[share] = self.measure(share, self.choosing, self.dense[0])
            log.info("keeping %.3f of the weights: %s %.4g, %.2f %% lost", share, metric, value, 100 * self.lost[share])
            self.made.append(Attempt(share, value))
        return min((share for share, loss in self.lost.items() if loss <= self.limit), default=None)

    def confirm(self, share: float) -> bool:
        """Whether a share is within the limit on the other half as well; if not, that loss counts."""
        value, loss = self.measure(share, self.session.measure, self.dense[1])
        self.made = [replace(one, confirmed=value) if one.keep == share else one for one in self.made]
        if loss > self.limit:
            log.warning("keeping %.2f of the weights loses %.2f %% on the other half of the data", share, 100 * loss)
            self.lost[share] = loss
        return loss <= self.limit

    def take_best(self) -> None:
        """Take the share that loses least on the other half, where none is within the limit."""
        confirmed = [one.keep for one in self.made if one.confirmed is not None]
        if not confirmed:
            share = max(self.lost)
            raise PermpruneError(
                f"no mix that was tried loses at most {100 * self.limit:g} %: with {share:.2f} of the weights it is "
                f"{100 * self.lost[share]:.3g} %; allow more, take a larger --effort, or denser --candidates"
            )
        share = min(confirmed, key=self.lost.__getitem__)
        self.measure(share, self.session.measure, self.dense[1])
        log.warning(
            "no mix that was tried loses at most %g %% on both halves of the data: this one, with %.2f of the weights, "
            "loses least, %.3g %%",
            *(100 * self.limit, share, 100 * self.lost[share]),
        )

    def measure(self, share: float, meter: Meter, dense: Result) -> tuple[float, float]:
        """Return the value and the loss of a run that keeps a share of the weights, measured beside the dense model."""
        weights = self.weights
        if weights.mix is None or weights.chosen_for != share:
            weights.choose_patterns(share)
            weights.search(self.method, replace(weights.plan.run, callbacks=self.callbacks))
        stage(stages.MEASURE)
        try:
            value = meter()[0].value
        except NotFinite:
            value = math.inf
        return value, loss_of(replace(dense, value=value), dense)


def loss_of(result: Result, dense: Result) -> float:
    """Return what a result loses, as a share of the dense model's. Raises `PermpruneError` if that is 0."""
    if not dense.value:
        raise PermpruneError(
            f"the dense model's {dense.metric} is 0, of which no share can be lost: give keep or bytes"
        )
    change = dense.value - result.value if dense.metric.higher_is_better else result.value - dense.value
    return change / abs(dense.value) if math.isfinite(change) else math.inf
