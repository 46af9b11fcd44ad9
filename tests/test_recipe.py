"""A recipe: what is kept of the changes of the weights, in which order, and within which time."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.errors import PermpruneError
from permprune.losses.objective import ONE_LABEL_DIVERGENCE, Objective
from permprune.permuters.base import Identity
from permprune.permuters.trust_region import Newton
from permprune.pruning.network import PrunedNetwork
from permprune.recipe import Recipe
from permprune.system import search_state
from permprune.system.search_state import Checkpoint, Resumable
from permprune.training.train import Training
from permprune.updates.methods import ADMM, NoUpdate, SparseGPT

from .modalities import make, sentences

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
ORDER, TEACHER = Newton(rounds=1, examples=4, start=Identity()), Objective(task=0, divergence=1)
"""A short search, and the loss to the dense model's outputs, which a random model has no better ones than."""
UPDATED = Recipe(ORDER, ADMM(), Training(objective=TEACHER))
TRAINED = Recipe(ORDER, NoUpdate(), Training(steps=6, rate=0.12))
ALL = Recipe(ORDER, ADMM(), Training(steps=2, blocks=True, objective=TEACHER))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    found = prepare(tiny_llama, None, config, examples=WINDOWS)
    # what is learned is measured
    return dataclasses.replace(found, run=dataclasses.replace(found.run, held_out=found.run.train))


def shown(network: PrunedNetwork) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in network.shown.items()}


def stages(recipe: Recipe, prepared: Prepared, **run: Any) -> list[str]:
    """The stages on the curve of a recipe, after those of the search."""
    curve = recipe.solve(prepared.network, dataclasses.replace(prepared.run, **run)).curve
    return [point.stage for point in curve if point.stage != "search"]


@pytest.mark.parametrize("method", [SparseGPT(), ADMM()])
def test_the_weights_are_those_of_the_update_with_its_own_masks(prepared: Prepared, method: SparseGPT | ADMM) -> None:
    network, run = prepared.network, prepared.run
    solution = dataclasses.replace(UPDATED, update=method).solve(network, run)
    assert [point.stage for point in solution.curve] == ["search", "search", "update"]
    assert solution.curve[-1].kept
    found = shown(network)
    network.set_bits({})
    network.set_weights({})
    method.run(network, run.batch(0, 32))
    for name, weight in network.updated.items():
        torch.testing.assert_close(found[name], weight)
        columns = network.stored_columns()[name]
        assert (found[name][:, columns].unflatten(1, (-1, 4)).ne(0).sum(-1) <= 2).all()


def test_an_update_that_only_harms_is_taken_back(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ORDER.solve(prepared.network, prepared.run)
    masked = shown(prepared.network)
    monkeypatch.setattr(ADMM, "apply", lambda *arguments: torch.ones_like(arguments[1]))
    after = UPDATED.solve(prepared.network, prepared.run)
    assert not after.curve[-1].kept and after.orders.keys() == before.orders.keys() and not after.weights
    assert all(torch.equal(weight, masked[name]) for name, weight in shown(prepared.network).items())


def test_training_lowers_the_loss_at_masks_of_the_pattern_and_is_recalled(prepared: Prepared) -> None:
    network, run = prepared.network, prepared.run
    ORDER.solve(network, run)
    before, masked, dense = network.loss(run.held_out, Objective()), shown(network), dict(network.dense)
    solution = TRAINED.solve(network, run)
    assert network.loss(run.held_out, Objective()) == pytest.approx(solution.curve[-1].loss, abs=1e-6)
    assert solution.curve[-1].loss < before
    for name, columns in network.stored_columns().items():
        weight = network.shown[name]
        assert torch.equal(weight, solution.weights[name] * network.masks[name])
        assert network.patterns[name].holds(weight[:, columns])
        assert not torch.equal(solution.weights[name], dense[name]) and torch.equal(network.dense[name], dense[name])
    ORDER.solve(network, run)  # recalled: the dense weights are back
    assert all(torch.equal(weight, masked[name]) for name, weight in shown(network).items())
    assert TRAINED.solve(network, run) is solution


def test_training_at_a_rate_that_raises_the_loss_is_refused(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    wild = dataclasses.replace(TRAINED, train=Training(steps=3, rate=40.0, objective=TEACHER))
    solution = wild.solve(prepared.network, prepared.run)
    assert not solution.weights and not solution.curve[-1].kept
    assert "give a lower rate, as in --train steps=3:rate=10" in caplog.text


def test_one_change_follows_the_other_with_the_masks_of_the_update(prepared: Prepared) -> None:
    network = prepared.network
    UPDATED.solve(network, prepared.run)
    masks = {name: mask.clone() for name, mask in network.masks.items()}
    assert stages(ALL, prepared) == ["update", "blocks", "training"]
    assert all(torch.equal(mask, masks[name]) for name, mask in network.masks.items())
    assert ALL.stages[-3:] == ("update the weights", "train the blocks", "train")
    assert ALL.lines[:2] == ("order: newton, start none, 1 round, 4 examples", "update: admm")
    assert ALL.lines[2] == "train: 2 steps, blocks first, task 0, divergence 1"


def test_one_shot_orders_are_those_found_or_the_natural_ones(prepared: Prepared) -> None:
    network, found = prepared.network, []
    for order in ("none", "random", "ria"):
        recipe = dataclasses.replace(TRAINED, order=PruneConfig(order=order).recipe.order)
        solution = recipe.solve(network, prepared.run)
        own = recipe.order.solve(network, prepared.run).orders
        assert any(
            all(torch.equal(solution.orders[name], order) for name, order in orders.items())
            for orders in (own, network.identity())
        )
        found.append(solution.curve[0].loss)
    assert max(found) == found[0]


def test_beside_labels_that_stand_alone_the_divergence_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make("bert"), None, PruneConfig(precision="fp32"), examples=sentences())
    asked, loss = [], PrunedNetwork.loss

    def spy(network: PrunedNetwork, examples: Any, objective: Objective, outputs: Any) -> float:
        asked.append(objective)
        return loss(network, examples, objective, outputs)

    monkeypatch.setattr(PrunedNetwork, "loss", spy)
    Recipe(Identity(), ADMM(), Training()).solve(prepared.network, prepared.run)
    assert asked == [Objective(divergence=ONE_LABEL_DIVERGENCE)] * 3


def test_an_order_alone_measures_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrunedNetwork, "loss", None)
    Recipe(Identity(), NoUpdate(), Training()).solve(prepared.network, prepared.run)


def test_a_callback_that_stops_the_search_stops_the_recipe(prepared: Prepared) -> None:
    assert not stages(ALL, prepared, callbacks=(lambda told: True,))


def test_changes_keep_a_time_limit(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[float] = []

    def stop(*_: Any, limit: float, **__: Any) -> None:
        limits.append(limit)

    assert TRAINED.rounds_share == pytest.approx(0.3) and UPDATED.rounds_share == 1
    assert stages(TRAINED, prepared, minutes=1e-9) == []
    assert "training: no time is left of the 1e-09 minutes" in caplog.messages
    monkeypatch.setattr(ADMM, "run", stop)
    dataclasses.replace(UPDATED, order=Identity()).solve(
        prepared.network, dataclasses.replace(prepared.run, minutes=2.0)
    )
    assert 100 < limits[0] <= 120


def test_a_time_limit_leaves_blocks_as_they_are(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, apply, waits = prepared.network, ADMM.apply, [1.5]

    def slow_at_first(self: ADMM, *arguments: Any) -> torch.Tensor:
        time.sleep(waits.pop() if waits else 0)
        return apply(self, *arguments)

    monkeypatch.setattr(ADMM, "apply", slow_at_first)
    recipe = dataclasses.replace(UPDATED, order=Identity())
    before = shown(network)
    solution = recipe.solve(network, dataclasses.replace(prepared.run, minutes=1 / 60))
    assert "blocks from model.layers.1.self_attn.q_proj on are not updated" in caplog.text
    assert solution.curve[-1].kept
    same = {name for name, weight in shown(network).items() if torch.equal(weight, before[name])}
    assert same == {name for name in before if ".layers.1." in name}


def test_an_interrupted_one_goes_on_with_the_next_block(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network, run, apply, calls = prepared.network, prepared.run, ADMM.apply, list[int]()

    def counted(self: ADMM, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == stops:
            raise KeyboardInterrupt
        return apply(self, *arguments)

    def update() -> dict[str, torch.Tensor]:
        network.set_weights({})
        ADMM().run(network, run.batch(0, 16), saved=Resumable(Checkpoint(tmp_path, {}), "update"))
        return {name: weight.clone() for name, weight in network.updated.items()}

    monkeypatch.setattr(ADMM, "apply", counted)
    monkeypatch.setattr("permprune.system.search_state.EVERY", 0.0)
    stops = 10  # in the second block of seven layers
    with pytest.raises(KeyboardInterrupt):
        update()
    stops = 0
    resumed = update()
    assert len(calls) == 10 + 7
    again = update()
    assert len(calls) == 10 + 7  # all of them were saved
    (tmp_path / "update.safetensors").unlink()
    whole = update()
    assert all(torch.equal(one[name], weight) for name, weight in whole.items() for one in (resumed, again))


@pytest.mark.parametrize("other", [UPDATED.update, SparseGPT()], ids=repr)
def test_a_training_does_not_go_on_from_one_after_other_changes(
    prepared: Prepared, other: ADMM | SparseGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_state, "EVERY", 0.0)
    recipe = dataclasses.replace(TRAINED, update=other)
    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("permprune.training.train.place", stopped_after(2))
        TRAINED.solve(prepared.network, run)
    resumed = recipe.solve(prepared.network, run)
    whole = recipe.solve(prepared.network, dataclasses.replace(run, checkpoint=Checkpoint(None, {}), solved={}))
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


def stopped_after(steps: int) -> Callable[..., float]:
    """In place of the schedule: an interrupt after so many steps."""

    def place(_: int, __: float, done: int, ___: float) -> float:
        if done == steps:
            raise KeyboardInterrupt
        return 0.5

    return place


def test_parts_are_values_and_an_effort_sets_all_of_them() -> None:
    config = PruneConfig(train="steps=60:blocks=true")
    assert config.recipe == Recipe(Newton(), NoUpdate(), Training(steps=60, blocks=True))
    assert config.recipe.lines == ("order: newton", "update: none", "train: 60 steps, blocks first")
    assert config.completed().to_json()["order"] == "newton" and config.order is None
    assert PruneConfig(train=Training(steps=60)).to_json()["train"] == "steps=60"
    assert PruneConfig(train=Training()).to_json()["train"] == "none"
    for wrong, message in (("60", '"60" is not an option of training'), ("steps=-1", "steps is -1")):
        with pytest.raises(PermpruneError, match=message):
            PruneConfig(train=wrong)
    with pytest.raises(PermpruneError, match="effort hour sets the recipe of prune alone"):
        PruneConfig(effort="hour").completed()
