"""Epsilon schedules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.matching.schedule import Cosine, Geometric

falling = st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).map(lambda pair: sorted(pair, reverse=True))
shares = st.floats(0, 1)


@pytest.mark.parametrize("schedule", [Geometric, Cosine])
@given(ends=falling, one=shares, other=shares)
def test_falls_from_start_to_end_without_rising(schedule, ends, one, other):
    epsilon = schedule(*ends)
    assert (epsilon(0), epsilon(1)) == tuple(ends)
    early, late = sorted((one, other))
    assert epsilon(early) >= epsilon(late) * (1 - 1e-12)
    assert ends[0] * (1 + 1e-12) >= epsilon(early) >= ends[1] * (1 - 1e-12)


def test_geometric_is_halfway_at_the_geometric_mean_and_cosine_at_the_mean():
    assert Geometric(1.0, 0.01)(0.5) == pytest.approx(0.1)
    assert Cosine(1.0, 0.01)(0.5) == pytest.approx(0.505)


@pytest.mark.parametrize("start, end", [(1, 0), (1, -1), (0.1, 1), (math.inf, 1), (math.nan, 1), (1, math.nan)])
@pytest.mark.parametrize("schedule", [Geometric, Cosine])
def test_refuses_ends_that_do_not_fall_to_a_positive_number(schedule, start, end):
    with pytest.raises(PermpruneError, match="epsilon cannot go from"):
        schedule(start, end)
