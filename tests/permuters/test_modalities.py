"""The permuters on models of images, padded sentences, speech, and without a head."""

import pytest
import torch

from permprune.permuters import PERMUTERS, Learned, Newton
from permprune.permuters.trust_region import TrustRegion
from permprune.pipeline import Settings, finish, prepare, update_weights
from permprune.tasks import running

from ..modalities import EXAMPLES, make
from .test_permuters import brief, same

SETTINGS = {"precision": "fp32", "measured": 4, "held_out": 2}
METHODS = [name for name in PERMUTERS if name not in ("none", "random", "cp")]


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("data", EXAMPLES)
def test_every_permuter_finds_orders_that_repeat_and_fold(data: str, mode: str) -> None:
    model, examples = make(data), EXAMPLES[data]()
    prepared, again = (prepare(m, None, Settings(mode=mode, **SETTINGS), examples) for m in (model, make(data)))
    network, run = prepared.network, prepared.run
    for name in METHODS:
        method = brief(name)
        solution = method.solve(network, run)
        for problem in network.problems:
            assert torch.equal(solution.orders[problem.name].sort().values, torch.arange(problem.size))
        if name in ("ria", "reconstruction"):
            assert not same(solution.orders, network.identity())
        if name == "newton":
            assert same(method.solve(again.network, again.run).orders, solution.orders)
        if isinstance(method, TrustRegion):
            best = min(point.loss for point in solution.curve)
            assert network.loss(run.held_out, method.objective) == pytest.approx(best, abs=1e-5)
            assert best <= solution.curve[0].loss
    natural = network.measures()
    with torch.no_grad(), running(model, examples[:2]) as output:
        masked = output[0]
    pruned = finish(prepared, solution, natural)
    with torch.no_grad(), running(pruned.model, examples[:2]) as output:
        torch.testing.assert_close(output[0], masked, rtol=0, atol=1e-4)


@pytest.mark.parametrize("data", EXAMPLES)
def test_sparsegpt_lowers_the_output_errors(data: str) -> None:
    prepared = prepare(make(data), None, Settings(update="sparsegpt", **SETTINGS), dict(**EXAMPLES[data]()))
    before = prepared.network.measures()
    update_weights(prepared)
    assert sum(row["error"] for row in prepared.network.measures()) < sum(row["error"] for row in before)


@pytest.mark.parametrize("method", [Newton(rounds=6, examples=4), Learned(rounds=6, examples=4)])
def test_a_model_without_a_head_is_searched_for_what_it_says_itself(method: TrustRegion) -> None:
    prepared = prepare(make("headless"), None, Settings(mode="gather", **SETTINGS), EXAMPLES["headless"]())
    losses = [point.loss for point in method.solve(prepared.network, prepared.run).curve if point.kept]
    assert losses[-1] < 0.99 * losses[0]
