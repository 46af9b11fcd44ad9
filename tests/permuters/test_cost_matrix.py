"""Cost matrices trained through the matching: the gradient, and that training moves channels to a lower loss."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.losses.objective import Objective
from permprune.permuters.base import Random
from permprune.permuters.cost_matrix import LAST_EPSILON, CostMatrixLearner, LearnedPaper, PermLLM
from permprune.permuters.iterate import Landscape
from permprune.permuters.reconstruction import Reconstruction

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    settings = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, settings, examples=WINDOWS)


def test_the_entropy_weight_falls_to_its_last_value() -> None:
    for method, half in ((LearnedPaper(), LAST_EPSILON**0.5), (PermLLM(), (1 + LAST_EPSILON) / 2)):
        found = [method.epsilon(progress) for progress in (0.0, 0.5, 1.0)]
        assert found == pytest.approx([1.0, half, LAST_EPSILON])


def test_the_gradient_of_a_cost_is_that_of_the_loss(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a difference quotient of the relaxed network's loss; no mask changes over so small a step."""
    network, run = prepared.network, prepared.run
    still = LearnedPaper(noise=0.0, examples=4, learning_rate=0.0, objective=Objective())
    monkeypatch.setattr(LearnedPaper, "epsilon", lambda method, progress: 0.5)
    method = dataclasses.replace(still, margin=3.0)
    landscape = Landscape(network, run, Objective())
    state = method.init(landscape)
    name = network.problems[0].name
    gradient, cost = method.gradients(landscape, state)[name], state.costs[name].cost
    direction = 0.1 * gradient / gradient.abs().max()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            cost += sign * direction
            network.show(method.relaxed_weights(landscape, state))
            losses.append(network.loss(run.train[:4], Objective()))
            cost -= sign * direction
    assert float((gradient * direction).sum()) == pytest.approx((losses[0] - losses[1]) / 2, rel=0.05)


@pytest.mark.parametrize("method", [LearnedPaper(), PermLLM()])
def test_hard_plans_show_the_masks_of_their_orders(prepared: Prepared, method: CostMatrixLearner) -> None:
    network, run = prepared.network, prepared.run
    method = dataclasses.replace(method, start=Random(), noise=0.0, margin=50.0)
    landscape = Landscape(network, run, Objective())
    state = method.init(landscape)
    with torch.no_grad():
        for name, weight in method.relaxed_weights(landscape, state).items():
            torch.testing.assert_close(weight, network.shown[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [LearnedPaper, PermLLM])
def test_training_moves_channels_and_keeps_the_best(prepared: Prepared, method: type[CostMatrixLearner]) -> None:
    learner = method(start=Random(), steps=12, examples=8, check=2, learning_rate=0.5)
    solution = learner.solve(prepared.network, prepared.run)
    losses = [point.loss for point in solution.curve]
    assert len(losses) == 7 and len(set(losses)) > 2
    assert prepared.network.loss(prepared.run.held_out, learner.objective) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < losses[0]


@pytest.mark.parametrize("method", [LearnedPaper(steps=2), PermLLM(steps=2)], ids=repr)
def test_the_fisher_information_of_the_calibration_is_read_by_the_start_alone(
    prepared: Prepared, method: CostMatrixLearner
) -> None:
    assert not method.uses_fisher and dataclasses.replace(method, start=Reconstruction()).uses_fisher
    expected = method.solve(prepared.network, prepared.run)
    prepared.network.statistics.fisher.clear()
    found = method.solve(prepared.network, dataclasses.replace(prepared.run, solved={}))
    assert [point.loss for point in found.curve] == [point.loss for point in expected.curve]


def test_widths_that_do_not_divide_are_one_part(prepared: Prepared) -> None:
    pattern = prepared.outline.pattern
    assert LearnedPaper().part_size(64, pattern) == 16
    assert LearnedPaper().part_size(24, pattern) == 24
    assert PermLLM().part_size(128, pattern) == 64
    assert PermLLM().part_size(96, pattern) == 96
