"""Refinement of masks: swaps against their formula written out, and the search that makes them."""

import dataclasses
import itertools
import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import permprune
from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.losses.objective import Objective
from permprune.permuters import refinement
from permprune.permuters.base import Identity
from permprune.permuters.iterate import Landscape, SearchState
from permprune.permuters.refinement import Swaps, find_swaps, refine_masks, swapped
from permprune.permuters.trust_region import Newton
from permprune.system.search_state import Checkpoint, Resumable

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
BRIEF = {"rounds": 2, "examples": 16, "limit": float("inf"), "saved": Resumable(Checkpoint(None, {}), "refinement")}
METHOD = Newton(rounds=1, examples=8, refine=2, start=Identity())


@pytest.fixture(params=["2:4", "1:4"])
def prepared(tiny_llama: LlamaForCausalLM, request: pytest.FixtureRequest) -> Prepared:
    config = PruneConfig(pattern=request.param, mode="gather", precision="fp32", measured=6, held_out=4)
    found = prepare(tiny_llama, None, config, examples=WINDOWS)
    generator = torch.Generator().manual_seed(2)
    orders = {problem.name: torch.randperm(problem.size, generator=generator) for problem in found.network.problems}
    found.network.set_orders(orders)
    # what is learned is measured
    return dataclasses.replace(found, run=dataclasses.replace(found.run, held_out=found.run.train))


def groups_follow(prepared: Prepared) -> bool:
    network = prepared.network
    columns = network.stored_columns()
    return all(
        (mask[:, columns[name]].view(len(mask), -1, network.patterns[name].m).sum(-1) == network.patterns[name].n).all()
        for name, mask in network.masks.items()
    )


@pytest.mark.parametrize("damping", [0.1, 1000.0])
def test_swaps_are_the_best_of_each_row_of_a_group(
    prepared: Prepared, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, name = prepared.network, next(name for name in prepared.network.layers if "up_proj" in name)
    monkeypatch.setattr(refinement, "GROUPS_AT_ONCE", 40)  # several blocks
    gradients = network.gradients(prepared.run.batch(0, 8), Objective())
    found = find_swaps(network, name, gradients, damping)
    weight, gradient = network.dense[name].double(), gradients.weight[name].double()
    moments, width = network.statistics.moments[network.sites[name]].double(), weight.shape[1]
    expected = {}
    for row, group in itertools.product(range(len(weight)), network.stored_columns()[name].view(-1, 4).tolist()):
        kept = [c for c in group if network.masks[name][row, c]]
        for k, p in itertools.product(kept, set(group) - set(kept)):
            step = torch.zeros(width, dtype=torch.float64)
            step[k], step[p] = -weight[row, k], weight[row, p]
            curvature = float(gradients.fisher[name][row] * (step @ moments @ step))
            linear = float(gradient[row] @ step)
            change = linear + damping / 2 * curvature
            if linear < -3 * (curvature / gradients.count) ** 0.5 and change < expected.get((row, *group), (0.0,))[0]:
                expected[row, *group] = change, row * width + k, row * width + p
    assert expected if damping < 1 else True
    order = found.kept.argsort()
    _, kept, pruned = zip(*sorted(expected.values(), key=lambda one: one[1]), strict=True) if expected else ((),) * 3
    assert found.kept[order].tolist() == list(kept) and found.pruned[order].tolist() == list(pruned)
    wanted = torch.tensor([change for change, *_ in sorted(expected.values(), key=lambda one: one[1])])
    torch.testing.assert_close(found.change[order], wanted.float(), rtol=1e-3, atol=1e-7)


def test_rounds_lower_the_loss_and_keep_the_pattern(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refinement, "DAMPING", 10.0)
    network, before = prepared.network, prepared.network.bits
    landscape = Landscape(network, prepared.run, Objective())
    first = landscape.held_out_loss()
    state = SearchState(orders=network.orders, best=first)
    with caplog.at_level(logging.INFO, logger="permprune"):
        best = refine_masks(landscape, state, **{**BRIEF, "rounds": 3}).best
    assert best < first - 1e-3 and landscape.held_out_loss() == pytest.approx(best, abs=1e-6)
    assert groups_follow(prepared)
    assert len([line for line in caplog.messages if "swaps" in line]) == 3
    network.set_bits({})  # those of the scores
    assert all(torch.equal(bits, before[name]) for name, bits in network.bits.items())


def test_the_loss_cannot_rise(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    network, before = prepared.network, prepared.network.bits
    landscape = Landscape(network, prepared.run, Objective())
    monkeypatch.setattr(landscape, "held_out_loss", lambda: 9.0)
    refined = refine_masks(landscape, SearchState(orders=network.orders, best=8.0), **BRIEF)
    assert [point.loss for point in refined.curve] == [8.0, 8.0]
    assert all(torch.equal(bits, before[name]) for name, bits in network.bits.items())


def test_swaps_exchange_weights(prepared: Prepared) -> None:
    network, name = prepared.network, next(iter(prepared.network.layers))
    mask = network.masks[name]
    kept, pruned = mask.flatten().nonzero()[:2, 0], (~mask).flatten().nonzero()[:2, 0]
    swaps = {name: Swaps(kept, pruned, torch.tensor([-2.0, -1.0]))}
    network.set_bits(swapped(network, swaps, -2.0))
    assert torch.equal(
        (network.masks[name] != mask).flatten().nonzero()[:, 0], torch.stack([kept[0], pruned[0]]).sort()[0]
    )


def test_a_solution_has_the_masks(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "DAMPING", 10.0)
    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {}))
    network = prepared.network
    solution = METHOD.solve(network, run)
    assert [point.stage for point in solution.curve] == ["search"] * 2 + ["refinement"] * 2
    assert solution.curve[-1].loss < solution.curve[1].loss and groups_follow(prepared)
    Identity().solve(network, run)  # starts from the masks of the scores
    assert all(
        torch.equal(mask, network.patterns[name].mask(network.scores[name])) for name, mask in network.masks.items()
    )
    again = METHOD.solve(network, dataclasses.replace(run, solved={}))  # saved on disk
    assert all(torch.equal(again.bits[name], bits) for name, bits in solution.bits.items())
    assert network.loss(run.held_out, Objective()) == pytest.approx(solution.curve[-1].loss, abs=1e-5)


def test_the_time_limit_ends_the_rounds_and_what_follows(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    method = dataclasses.replace(METHOD, block_steps=2, train_steps=2)
    solution = method.solve(prepared.network, dataclasses.replace(prepared.run, minutes=1e-9))
    assert [point.stage for point in solution.curve] == ["search"]
    left_out = [line.split(":")[0] for line in caplog.messages if "no time is left of --minutes" in line]
    assert left_out == ["refinement", "blocks", "training"]


def test_a_refined_model_is_verified(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "DAMPING", 1.0)
    dense = tiny_llama.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    pruned = permprune.prune(tiny_llama, examples=WINDOWS, permute=METHOD, precision="fp32", mode="gather")
    assert [point.stage for point in pruned.solution.curve][-1] == "refinement"
    weight = pruned.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert set(weight[weight != 0].tolist()) <= set(dense.flatten().tolist())  # no weight changed its value
    pruned.save_pretrained(tmp_path / "pruned")
    assert permprune.verify(tmp_path / "pruned").layers == 14
