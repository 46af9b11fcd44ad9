"""The choice within a budget beside all choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permprune.errors import PermpruneError
from permprune.matching.knapsack import cheapest


@given(
    layers=st.integers(1, 5),
    choices=st.integers(1, 5),
    largest=st.sampled_from([2, 10, 1000]),
    kind=st.sampled_from(["random", "equal", "few values"]),
    scale=st.sampled_from([1e-7, 1.0, 1e7]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_no_choice_within_the_budget_costs_less(
    layers: int, choices: int, largest: int, kind: str, scale: float, share: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, largest, (layers, choices))
    costs = {
        "random": generator.normal(size=(layers, choices)) ** 3,
        "equal": np.full((layers, choices), -1.0),
        "few values": generator.integers(0, 3, (layers, choices)).astype(float),
    }[kind] * scale
    least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    budget = least + int(share * (most - least))

    def sums(choice: tuple[int, ...]) -> tuple[float, int]:
        return costs[range(layers), choice].sum(), sizes[range(layers), choice].sum()

    within = [sums(choice) for choice in itertools.product(range(choices), repeat=layers)]
    found = sums(tuple(cheapest(costs, sizes, budget)))
    assert found[1] <= budget
    assert found[0] <= min(cost for cost, size in within if size <= budget) + 1e-7 * np.abs(costs).max()


def test_many_layers_cost_hardly_more_than_their_bound() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 10**6, (300, 1)) * np.arange(1, 8)
    costs = np.sort(generator.exponential(size=sizes.shape) * generator.lognormal(size=(300, 1)))[:, ::-1]
    budget = int(0.5 * sizes[:, -1].sum())
    choice = cheapest(costs, sizes, budget)
    assert sizes[range(300), choice].sum() <= budget
    bounds = [(costs + price * sizes).min(1).sum() - price * budget for price in np.geomspace(1e-9, 1e-3, 3000)]
    assert max(bounds) <= costs[range(300), choice].sum() <= max(bounds) + 1e-3 * costs.max()


def test_bad_input() -> None:
    costs, sizes = np.ones((2, 2)), np.array([[3, 4], [3, 5]])
    with pytest.raises(PermpruneError, match="smallest choices take 6 of 5"):
        cheapest(costs, sizes, 5)
    with pytest.raises(PermpruneError, match="not finite"):
        cheapest(costs * np.nan, sizes, 9)
