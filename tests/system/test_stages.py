import pytest

from permprune.system import progress
from permprune.system.progress import Stages, duration


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, to be set."""
    passed = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: passed[0])
    return passed


def test_the_next_stage_of_a_name_begins():
    run = Stages(["search", "measure", "search", "measure", "write"])
    assert [run.enter(name) for name in ("search", "measure", "measure", "write", "search")] == [True] * 4 + [False]
    assert run.current == 4


def test_the_time_left_needs_the_times_of_what_is_left(clock):
    run = Stages(["read", "search", "write"])
    run.enter("read")
    assert run.left() is None
    run.expect({"read": None, "search": 80.0, "write": 20.0})
    assert run.left() is None
    run.enter("search")
    assert run.left() == pytest.approx(100)


def test_the_time_left_follows_the_pace_of_the_run(clock):
    run = Stages(["search", "train", "write"])
    run.expect({"search": 100.0, "train": 100.0, "write": 100.0})
    run.enter("search")
    assert run.left() == pytest.approx(300)
    clock[0] = 50.0
    assert run.left() == pytest.approx(250)  # by the clock
    assert run.left(0.25) == pytest.approx(200 + 0.75 * (50 + 75))  # slower than expected
    clock[0] = 200.0
    run.enter("train")
    assert 200 < run.left() < 400 and run.left(1.0) < 200  # twice as slow as expected, and less sure of that


def test_a_stage_with_a_time_limit_ends_by_the_clock(clock):
    run = Stages(["read", "search"])
    run.expect({"read": 10.0, "search": 60.0}, limited=["search"])
    run.enter("read")
    clock[0] = 100.0
    run.enter("search")
    assert run.left() == pytest.approx(60)  # however slow reading was
    clock[0] = 130.0
    assert run.left(0.1) == pytest.approx(30)
    clock[0] = 300.0
    assert run.left(0.1) == 0


@pytest.mark.parametrize(("seconds", "text"), [(1.23, "1.2 s"), (59.6, "60 s"), (600.0, "10 min"), (9000.0, "2.5 h")])
def test_durations_as_text(seconds, text):
    assert duration(seconds) == text


def test_stages_may_be_planned_later(clock):
    run = Stages()
    assert not run.enter("read")
    run.plan(["read", "write"])
    assert run.enter("read") and run.names == ["read", "write"]
