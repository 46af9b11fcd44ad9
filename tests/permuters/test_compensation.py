"""Compensation between the search and the training."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.losses.objective import Objective
from permprune.permuters.base import Identity
from permprune.permuters.iterate import Landscape, SearchState
from permprune.permuters.refinement import compensate
from permprune.permuters.trust_region import Newton
from permprune.system.search_state import Checkpoint, Resumable
from permprune.updates.methods import ADMM

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
METHOD = Newton(
    rounds=1, examples=4, start=Identity(), compensate=True, objective=Objective(task=0, divergence=1)
)  # the dense model's outputs, which a random model has no better ones than


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    found = prepare(tiny_llama, None, config, examples=WINDOWS)
    # what is learned is measured
    return dataclasses.replace(found, run=dataclasses.replace(found.run, held_out=found.run.train))


def test_the_weights_are_those_of_the_update_with_its_own_masks(prepared: Prepared) -> None:
    network, run = prepared.network, prepared.run
    solution = METHOD.solve(network, run)
    assert [point.stage for point in solution.curve] == ["search", "search", "compensation"]
    assert solution.curve[-1].kept and solution.curve[-1].loss < solution.curve[-2].loss
    found = {name: weight.clone() for name, weight in network.shown.items()}
    network.set_bits({})
    network.set_weights({})
    ADMM().run(network, run.batch(0, 16))
    for name, weight in network.updated.items():
        torch.testing.assert_close(found[name], weight)
        columns = network.stored_columns()[name]
        assert (found[name][:, columns].unflatten(1, (-1, 4)).ne(0).sum(-1) <= 2).all()


def test_it_is_taken_back_if_the_loss_rises(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataclasses.replace(METHOD, compensate=False).solve(prepared.network, prepared.run)
    shown = {name: weight.clone() for name, weight in prepared.network.shown.items()}
    monkeypatch.setattr(ADMM, "apply", lambda *arguments: torch.ones_like(arguments[1]))
    after = METHOD.solve(prepared.network, prepared.run)
    assert not after.curve[-1].kept and after.curve[-1].loss > before.curve[-1].loss
    assert all(torch.equal(weight, shown[name]) for name, weight in prepared.network.shown.items())


def test_a_time_limit_leaves_blocks_as_they_are(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = prepared.network
    network.set_weights({name: 1.1 * layer.weight for name, layer in network.layers.items()})
    landscape, apply, waits = Landscape.of(network, prepared.run, METHOD.objective), ADMM.apply, [1.5]

    def slow_at_first(self: ADMM, *arguments: Any) -> torch.Tensor:
        time.sleep(waits.pop() if waits else 0)
        return apply(self, *arguments)

    monkeypatch.setattr(ADMM, "apply", slow_at_first)
    before = {name: weight.clone() for name, weight in network.shown.items()}
    state = SearchState(orders=network.orders, best=landscape.held_out_loss())
    saved = Resumable(Checkpoint(None, {}), "compensation")
    after = compensate(landscape, state, examples=16, limit=1.0, saved=saved)
    assert "blocks from model.layers.1.self_attn.q_proj on are not updated" in caplog.text
    assert after.curve[-1].kept and after.best == pytest.approx(landscape.held_out_loss(), abs=1e-6)
    same = {name for name, weight in network.shown.items() if torch.equal(weight, before[name])}
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
        ADMM().run(network, run.batch(0, 16), saved=Resumable(Checkpoint(tmp_path, {}), "compensation"))
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
    (tmp_path / "compensation.safetensors").unlink()
    whole = update()
    assert all(torch.equal(one[name], weight) for name, weight in whole.items() for one in (resumed, again))


def test_training_follows_with_the_masks_of_the_update(prepared: Prepared) -> None:
    network = prepared.network
    METHOD.solve(network, prepared.run)
    masks = {name: mask.clone() for name, mask in network.masks.items()}
    trained = dataclasses.replace(METHOD, train_steps=3).solve(network, prepared.run)
    assert [point.stage for point in trained.curve][-2:] == ["compensation", "training"]
    assert all(torch.equal(mask, masks[name]) for name, mask in network.masks.items())
    assert trained.bits
