"""The search for the fewest weights within a loss, and the choice of candidates within a budget."""

import numpy as np
import pytest

from permprune.budget.allocate import Costs
from permprune.budget.sensitivity import layer_costs
from permprune.budget.shares import ATTEMPTS, next_share


@pytest.mark.parametrize(("power", "scale"), [(2, 0.5), (3.5, 0.5), (5, 0.3), (3, 4.0)])
def test_the_share_is_found_in_few_runs(power: float, scale: float) -> None:
    limit, tried = 0.01, list[tuple[float, float]]()
    while (share := next_share(tried, limit, 0.25, 0.98)) is not None:
        tried.append((share, scale * (1 - share) ** power))
    best = 1 - (limit / scale) ** (1 / power)
    found = min(share for share, loss in tried if loss <= limit)
    assert len(tried) <= ATTEMPTS and best <= found < best + 0.05


def test_the_search_ends_at_the_sparsest_candidates_if_nothing_is_lost() -> None:
    tried = list[tuple[float, float]]()
    while (share := next_share(tried, 0.01, 0.25, 0.98)) is not None:
        tried.append((share, -0.001))
    assert tried[-1][0] == pytest.approx(0.25)


def test_no_share_is_within_an_impossible_limit() -> None:
    tried = list[tuple[float, float]]()
    while (share := next_share(tried, 0.01, 0.25, 0.98)) is not None:
        tried.append((share, 9.0))
    assert 1 < len(tried) <= ATTEMPTS and all(0.7 <= share <= 0.98 for share, _ in tried)


def test_the_costs_of_layers_add_up_to_the_losses_of_uniform_patterns() -> None:
    """For a quadratic loss of the sum of all layers' errors the parts of the layers are exact: they grow together."""
    errors = np.array([[3.0, 1.0, 0.0], [1.5, 0.5, 0.0], [0.3, 0.1, 0.0]])  # of a layer's one weight, by candidate
    totals = errors.sum(0)
    slopes = dict(enumerate(-2 * total * (1 - errors) for total in totals))  # of the weight 1 - error
    costs = layer_costs(slopes, [float(total**2) for total in totals])
    assert costs.sum(0) == pytest.approx(totals**2)
    assert costs[:, 0] / costs[:, 0].sum() == pytest.approx(errors[:, 0] / totals[0])


@pytest.mark.parametrize("weights", [1_000_000, 4_915_200, 7_340_030])
def test_the_sparsest_choice_is_within_its_own_share(weights: int) -> None:
    kept = np.array([[weights * 7 // 10, weights]])
    costs = Costs(candidates=[], kept=kept, bytes=kept, weights=weights, others=0, limit=0)
    assert costs.keeping(costs.share_of([0])).fits([0])
