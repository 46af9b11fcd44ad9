"""A mix with the fewest weights that loses no more than a limit, by the measure of the evaluation."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from permprune.budget.asked import density_of, parse_candidates
from permprune.budget.shares import next_share
from permprune.checkpoints.record import Attempt, Measured
from permprune.engine.measuring import Meter
from permprune.engine.session import Session
from permprune.errors import PermpruneError
from permprune.evaluation.result import NotFinite, Result, difference_error
from permprune.permuters.base import Callback
from permprune.system import progress
from permprune.system.progress import log, stage

MOST = 0.98
"""The largest share of the weights that is tried."""

TIMES = 10.0
"""The most times that other shares are expected to lose what they do on the first half, where one was refused."""


def keep_within(session: Session, callbacks: tuple[Callback, ...] = ()) -> None:
    """Let the session's weights have the mix with the fewest weights that keeps to the `max_loss` of their config.

    Each attempt is a whole run: patterns for a share of the weights, a search, an update, and a measurement on the
    first half of the evaluation data (`Session.choosing`). The fewest weights within the limit there are confirmed on
    the other half, which no choice has seen. A loss is within the limit if its sum with its standard error is
    (`error_of`): else every second choice would lose more on other data. If the share is not confirmed, the search goes
    on with larger ones. The record tells of it. If none is confirmed, a warning tells what the best one loses.
    Raises `PermpruneError` if each share that was tried loses more than the limit on the first half, without its error.
    """
    attempts = _Attempts(session, callbacks)
    while (share := attempts.fewest()) is not None and not attempts.confirm(share):
        pass
    if share is None:
        attempts.take_best()
    assert session.weights.mix is not None
    session.weights.mix = replace(session.weights.mix, attempts=attempts.made)


class _Attempts:
    """The runs that are tried, by the share of the weights that they keep.

    `lost` are their losses on the first half of the data with the standard errors, and `refused` those on the other
    half of the shares that are not within the limit there.
    """

    def __init__(self, session: Session, callbacks: tuple[Callback, ...]) -> None:
        self.session, self.weights, self.callbacks = session, session.weights, callbacks
        choosing, limit = session.choosing, self.weights.plan.config.max_loss
        assert choosing is not None and limit is not None
        self.choosing, self.limit = choosing, limit
        with self.weights.dense():
            self.dense = choosing()[0], session.measure()[0]
        for one in self.dense:
            loss_of(one, one)  # refuses one that is 0 before anything is searched
        densities = [density_of(one) for one in parse_candidates(self.weights.plan.config.candidates)]
        self.least, self.most = densities[0], min(MOST, densities[-1])
        self.made = list[Attempt]()
        self.lost, self.refused = dict[float, tuple[float, float]](), dict[float, tuple[float, float]]()

    def expected(self) -> list[tuple[float, float]]:
        """The shares with their losses; how many times more refused ones lost on the other half is expected of all."""
        lost, refused = ({share: sum(both) for share, both in half.items()} for half in (self.lost, self.refused))
        times = max((loss / max(lost[share], self.limit / 10) for share, loss in refused.items()), default=1.0)
        return [(share, refused.get(share, min(times, TIMES) * loss)) for share, loss in lost.items()]

    def fewest(self) -> float | None:
        """Try shares, and return the smallest one that is expected within the limit; None if there is none."""
        metric, ends = self.dense[0].metric, (self.least, self.most)
        while (share := next_share(self.expected(), self.limit, *ends, refused=len(self.refused))) is not None:
            value, loss, error = self.measure(share, self.choosing, self.dense[0])
            message = "keeping %.3f of the weights: %s %.4g, %.2f %% lost, with a standard error of %.2f %%"
            log.info(message, share, metric, value, 100 * loss, 100 * error)
            self.lost[share] = loss, error
            self.made.append(Attempt(share, value))
        return min((share for share, loss in self.expected() if loss <= self.limit), default=None)

    def confirm(self, share: float) -> bool:
        """Whether a share is within the limit on the other half as well, with the standard error of its loss there."""
        value, loss, error = self.measure(share, self.session.measure, self.dense[1])
        self.made = [replace(one, confirmed=value, error=error) if one.keep == share else one for one in self.made]
        within = loss + error <= self.limit
        message = "keeping %.3f of the weights loses %.2f %% on the other half, with a standard error of %.2f %%"
        log.log(logging.INFO if within else logging.WARNING, message, share, 100 * loss, 100 * error)
        if not within:
            self.refused[share] = loss, error
        return within

    def take_best(self) -> None:
        """Take the share that loses least on the other half, where none is within the limit.

        If none was within the limit on the first half either, it is the one that lost least there.
        """
        if not self.refused:
            share = min(self.lost, key=lambda share: sum(self.lost[share]))
            loss, error = self.lost[share]
            if loss > self.limit:
                raise PermpruneError(
                    f"no mix that was tried loses at most {100 * self.limit:g} %: with {share:.2f} of the weights it "
                    f"is {100 * loss:.3g} % with a standard error of {100 * error:.2g} %; allow more, take a larger "
                    "--effort, or denser --candidates"
                )
            if self.confirm(share):
                return
        share = min(self.refused, key=self.refused.__getitem__)
        self.measure(share, self.session.measure, self.dense[1])
        log.warning(
            "no mix that was tried surely loses at most %g %% on both halves of the data: this one, with %.2f of the "
            "weights, loses least, %.3g %% with a standard error of %.2g %%; give more --data",
            *(100 * self.limit, share, *(100 * number for number in self.refused[share])),
        )

    def measure(self, share: float, meter: Meter, dense: Result) -> tuple[float, float, float]:
        """Return the value of a run that keeps a share of the weights, its loss beside `dense`, and its error."""
        weights = self.weights
        if weights.mix is None or weights.chosen_for != share:
            weights.choose_patterns(share)
            weights.run(self.session.recipe(), replace(weights.plan.run, callbacks=self.callbacks))
        stage(progress.MEASURE)
        try:
            result = meter()[0]
        except NotFinite:
            result = replace(dense, value=math.inf, terms=None, draws=None, stderr=None)
        return result.value, loss_of(result, dense), error_of(result, dense)


def warn_of_packing(measured: Measured, dense: Result, limit: float) -> None:
    """Log a warning if a model that was within the limit before it was packed loses more as it was measured since."""
    loss = loss_of(replace(dense, value=measured.pruned), dense)
    if loss > limit:
        log.warning(
            "packed as %s the model loses %.3g %%, more than the %g %% that its patterns were chosen for: pack it as "
            "another type, or give a smaller --max-loss",
            *(measured.packed, 100 * loss, 100 * limit),
        )


def loss_of(result: Result, dense: Result) -> float:
    """Return what a result loses, as a share of the dense model's. Raises `PermpruneError` if that is 0."""
    if not dense.value:
        raise PermpruneError(
            f"the dense model's {dense.metric} is 0, of which no share can be lost: give keep or bytes"
        )
    change = dense.value - result.value if dense.metric.higher_is_better else result.value - dense.value
    return change / abs(dense.value) if math.isfinite(change) else math.inf


def error_of(result: Result, dense: Result) -> float:
    """Return the standard error of `loss_of` on these examples, as the same share; 0 if it is not known."""
    return (difference_error(result, dense) or 0.0) / abs(dense.value)
