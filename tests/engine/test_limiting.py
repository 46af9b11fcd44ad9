"""The search for a mix within a loss: what it refuses, and what it tells where no share is confirmed."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from permprune.checkpoints.record import Attempt, Measured
from permprune.engine.limiting import keep_within, warn_of_packing
from permprune.errors import PermpruneError
from permprune.evaluation.result import Metric, NotFinite, Result


@dataclass(frozen=True)
class Chosen:
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True)
class NoRun:
    callbacks: tuple[Any, ...] = ()


class Weights:
    """Weights that a run prunes to a share; `share` is 1 where they are dense."""

    def __init__(self) -> None:
        config = SimpleNamespace(max_loss=0.01, candidates=["dense", "4:8"])
        self.plan = SimpleNamespace(config=config, run=NoRun())
        self.share, self.mix, self.chosen_for, self.searches = 1.0, Chosen(), None, 0

    def dense(self) -> Any:
        return nullcontext()

    def choose_patterns(self, share: float) -> None:
        self.share = self.chosen_for = share  # type: ignore[assignment]

    def run(self, *_: Any) -> None:
        self.searches += 1


def session(dense: float, slope: float, other: float, spread: float = 0.0) -> Any:
    """A session whose accuracy falls by these per weight pruned, on one half of the data and on the other.

    What is lost is `spread` more in one quarter of the data, and less in another.
    """
    weights = Weights()

    def meter(falls: float) -> Any:
        def measure() -> list[Result]:
            value = dense * (1 - falls * (1 - weights.share))
            apart = torch.tensor([spread, -spread, 0.0, 0.0], dtype=torch.float64) * (weights.share < 1)
            terms = 25 * (value - apart * dense), torch.full((4,), 25.0, dtype=torch.float64)
            return [Result("task", Metric("accuracy", higher_is_better=True), value, count=100, terms=terms)]

        return measure

    return SimpleNamespace(weights=weights, recipe=lambda: None, choosing=meter(slope), measure=meter(other))


def test_a_measure_of_zero_is_refused_before_any_search() -> None:
    run = session(0.0, 0.1, 0.1)
    with pytest.raises(PermpruneError, match="accuracy is 0, of which no share can be lost: give keep or bytes"):
        keep_within(run)  # type: ignore[arg-type]
    assert run.weights.searches == 0


def test_if_no_share_is_confirmed_the_loss_on_the_other_half_is_told(caplog: pytest.LogCaptureFixture) -> None:
    run = session(0.8, 0.05, 1.0)
    with caplog.at_level(logging.WARNING, logger="permprune"):
        keep_within(run)  # type: ignore[arg-type]
    confirmed = [one for one in run.weights.mix.attempts if one.confirmed is not None]
    best = max(confirmed, key=lambda one: one.confirmed or 0.0)
    assert run.weights.share == best.keep and best.confirmed == pytest.approx(0.8 * best.keep)
    assert f"loses least, {100 * (1 - best.keep):.3g} % with a standard error of 0 %" in caplog.messages[-1]


def test_a_loss_within_the_limit_must_be_so_with_its_error() -> None:
    exact, uncertain = session(0.8, 0.02, 0.03), session(0.8, 0.02, 0.03, spread=0.01)
    for run in (exact, uncertain):
        keep_within(run)  # type: ignore[arg-type]
    # the standard deviation of four numbers, 0.01, -0.01, 0 and 0, divided by the root of four
    error = 0.01 * math.sqrt(2 / 3) / 2
    last = {run.weights.share: run.weights.mix.attempts for run in (exact, uncertain)}
    assert exact.weights.share < uncertain.weights.share
    for share, attempts in last.items():
        kept = next(one for one in attempts if one.keep == share)
        assert kept.confirmed == pytest.approx(0.8 * (1 - 0.03 * (1 - share)))
        assert kept.error == pytest.approx(error if share == uncertain.weights.share else 0.0, abs=1e-9)
    refused = [one for one in uncertain.weights.mix.attempts if one.confirmed and one.keep != uncertain.weights.share]
    assert refused and all(1 - one.confirmed / 0.8 + error > 0.01 for one in refused if one.confirmed)
    assert 0.03 * (1 - uncertain.weights.share) + error <= 0.01


@pytest.mark.parametrize(("spread", "other", "confirmed"), [(0.03, 0.0, False), (0.03, -0.5, True)])
def test_where_the_error_alone_is_beyond_the_limit_the_other_half_decides(
    spread: float, other: float, confirmed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = session(0.8, 0.02, other, spread=spread)
    with caplog.at_level(logging.WARNING, logger="permprune"):
        keep_within(run)  # type: ignore[arg-type]
    (tried,) = [one for one in run.weights.mix.attempts if one.confirmed is not None]
    assert tried.keep == run.weights.share == max(one.keep for one in run.weights.mix.attempts)
    assert ("give more --data" in caplog.text) is not confirmed


def test_a_share_whose_loss_is_not_finite_on_the_other_half_is_refused() -> None:
    run = session(0.8, 0.02, 0.02)
    measure = run.measure

    def overflows() -> list[Result]:
        if run.weights.share < 0.65:
            raise NotFinite("the loss is not finite")
        found: list[Result] = measure()
        return found

    run.measure = overflows
    keep_within(run)  # type: ignore[arg-type]
    attempts = {one.keep: one for one in run.weights.mix.attempts}
    assert any(one.confirmed == math.inf for one in attempts.values())
    assert attempts[run.weights.share].confirmed == pytest.approx(0.8 * (1 - 0.02 * (1 - run.weights.share)))


def test_a_packed_model_that_loses_more_than_its_limit_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    dense = Result("task", Metric("accuracy", higher_is_better=True), 0.9, count=100)
    for value, told in ((0.895, False), (0.88, True)):
        caplog.clear()
        measured = Measured("data", "accuracy", 0.9, 0.8, value, 100, "examples", packed="int4")
        warn_of_packing(measured, dense, 0.01)
        assert ("packed as int4 the model loses 2.22 %, more than the 1 %" in caplog.text) is told
