"""The permuters on models of images, padded sentences, speech, and without a head."""

import math
from dataclasses import replace

import pytest
import torch

from permprune.config import PruneConfig
from permprune.engine.held import Held, prepare
from permprune.losses.objective import Objective
from permprune.models.forward import run_model
from permprune.permuters.learned import Learned
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.registry import PERMUTERS
from permprune.permuters.trust_region import Newton, TrustRegion
from permprune.system.search_state import Checkpoint, Resumable
from permprune.training.train import Training, train_weights
from permprune.updates.methods import update

from ..modalities import EXAMPLES, make
from .test_permuters import brief, same

pytestmark = pytest.mark.slow

SETTINGS = {"precision": "fp32", "measured": 4, "held_out": 2}
METHODS = {
    "vit": ["ria", "newton", "learned"],
    "bert": ["reconstruction", "newton", "permllm"],
    "whisper": ["ria", "reconstruction", "newton", "learned-paper"],
    "headless": ["ria", "newton", "learned"],
}
"""The methods read the problems of all data and modes in the same way: each kind of data has some of them in gather
mode, and those that take little time in fold mode.
"""
SLOWER = ("learned", "permllm", "learned-paper")


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("data", EXAMPLES)
def test_permuters_find_orders_that_repeat_and_fold(data: str, mode: str) -> None:
    model, examples = make(data), EXAMPLES[data]()
    config = PruneConfig(mode=mode, **SETTINGS)
    prepared, again = (prepare(m, None, config, examples=examples) for m in (model, make(data)))
    network, run = prepared.network, prepared.run
    for name in METHODS[data]:
        if mode == "fold" and name in SLOWER:
            continue
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
            objective = method.objective.suited(network.task, network.statistics.one_label_per_example)
            assert network.loss(run.held_out, objective) == pytest.approx(best, abs=1e-5)
            assert best <= solution.curve[0].loss
    natural = network.measures()
    with torch.no_grad():
        masked = run_model(model, examples[:2])[0]
    pruned = Held(prepared, None).finish(solution, natural)
    with torch.no_grad():
        torch.testing.assert_close(run_model(pruned.model, examples[:2])[0], masked, rtol=0, atol=1e-4)


@pytest.mark.parametrize("data", EXAMPLES)
def test_the_dense_model_is_asked_beside_labels_of_which_each_example_has_one(data: str) -> None:
    prepared = prepare(make(data), None, PruneConfig(**SETTINGS), examples=EXAMPLES[data]())
    network, run = prepared.network, prepared.run
    start, weight = PERMUTERS["none"](), 3.0 if data in ("vit", "bert") else 0.0
    for left_open in (Newton.objective, Learned.objective):
        closed, none = (replace(left_open, divergence=divergence) for divergence in (weight, 0.0))
        methods = [Newton(rounds=0, start=start, objective=own) for own in (left_open, closed, none)]
        losses = [method.solve(network, run).curve[0].loss for method in methods]
        assert losses[0] == losses[1]
        assert (losses[0] > losses[2]) == bool(weight)
        said = left_open.suited(network.task, network.statistics.one_label_per_example)
        assert said == closed == said.suited(network.task, one_label_per_example=True)


@pytest.mark.parametrize("data", EXAMPLES)
def test_rows_are_coupled_where_each_example_has_one_answer(data: str) -> None:
    prepared = prepare(make(data), None, PruneConfig(**SETTINGS), examples=EXAMPLES[data]())
    network, examples = prepared.network, EXAMPLES[data]()
    found = network.gradients(examples, Objective())
    assert bool(found.covariance) == (data != "whisper")
    for name, rows in found.covariance.items():
        assert torch.equal(rows.diagonal(), found.fisher[name])
        torch.testing.assert_close(rows, rows.T)
    if data in ("vit", "bert"):  # a loss of twice the size has gradients of four times the square
        twice = network.gradients(examples, Objective(2.0))
        for name, rows in found.fisher.items():
            torch.testing.assert_close(twice.fisher[name], 4 * rows)


def test_rows_of_wide_layers_are_left_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permprune.pruning.network.COUPLED", 32)  # of 48 rows are the layers into the MLP
    prepared = prepare(make("bert"), None, PruneConfig(mode="gather", **SETTINGS), examples=EXAMPLES["bert"]())
    network, run = prepared.network, prepared.run
    found = network.gradients(EXAMPLES["bert"](), Objective())
    assert {len(rows) for rows in found.covariance.values()} == {32}
    assert {rows.dim() for rows in found.fisher.values()} == {1}
    coupled = [
        rows.coupling is not None
        for problem in network.problems
        for bundle in QuadraticModel.of(
            network, problem, found.fisher, found.weight, covariance=found.covariance
        ).bundles
        for rows in bundle.rows
    ]
    assert any(coupled) and not all(coupled)
    assert brief("newton").search(network, run).curve


def test_divergence_curves_as_the_squares_of_labels_say() -> None:
    assert [Objective(*weights).curvature for weights in ((1.0,), (1.0, 3.0), (2.0, 2.0), (0.0, 1.0))] == [1, 4, 1, 1]


@pytest.mark.parametrize("data", EXAMPLES)
def test_sparsegpt_lowers_the_output_errors(data: str) -> None:
    prepared = prepare(make(data), None, PruneConfig(**SETTINGS), examples=dict(**EXAMPLES[data]()))
    before = prepared.network.measures()
    update("sparsegpt").run(prepared.network, prepared.measured)
    assert sum(row.error for row in prepared.network.measures()) < sum(row.error for row in before)


@pytest.mark.parametrize("method", [Newton(rounds=6, examples=4), Learned(rounds=6, examples=4)])
def test_a_model_without_a_head_is_searched_for_what_it_says_itself(method: TrustRegion) -> None:
    prepared = prepare(make("headless"), None, PruneConfig(mode="gather", **SETTINGS), examples=EXAMPLES["headless"]())
    losses = [point.loss for point in method.solve(prepared.network, prepared.run).curve if point.kept]
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("data", EXAMPLES)
def test_training_brings_hidden_states_close_to_the_dense_models(data: str) -> None:
    prepared = prepare(make(data), None, PruneConfig(**SETTINGS), examples=EXAMPLES[data]())
    network, run, distance = prepared.network, prepared.run, Objective(0.0, hidden_states=1.0)
    natural = network.loss(run.train, distance)

    def trained(loss: Objective) -> float:
        method, saved = Training(steps=30, rate=5e-3), Resumable(Checkpoint(None, {}), "training")
        network.set_weights(train_weights(network, run, method, loss, saved=saved, limit=math.inf))
        found = network.loss(run.train, distance)
        network.set_weights(network.dense)
        return found

    assert trained(Objective().for_training(network.task)) < min(0.9 * natural, trained(Objective(divergence=1.0)))
