"""All permuters on one tiny model: orders, repeatability, and what each promises to lower."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.checkpoint import Checkpoint
from permprune.errors import PermpruneError
from permprune.losses import Objective
from permprune.permuters import (
    CP,
    PERMUTERS,
    Learned,
    LearnedPaper,
    Newton,
    Permuter,
    Reconstruction,
    Solution,
    permuter,
)
from permprune.permuters.cost_matrix import CostMatrixLearner
from permprune.permuters.trust_region import TrustRegion
from permprune.pipeline import Prepared, Settings, prepare
from permprune.problem import Orders

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


def ready(model: LlamaForCausalLM, mode: str = "gather") -> Prepared:
    return prepare(model, None, Settings(mode=mode, precision="fp32", measured=6, held_out=4), WINDOWS)


def brief(name: str) -> Permuter:
    method = permuter(name)
    if isinstance(method, CP):
        return dataclasses.replace(method, escapes=10)
    if isinstance(method, CostMatrixLearner):
        return dataclasses.replace(method, steps=4, check=2, learning_rate=1.0)
    return dataclasses.replace(method, rounds=3, examples=4) if isinstance(method, TrustRegion) else method


def same(a: Orders, b: Orders) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("name", PERMUTERS)
def test_orders_are_permutations_and_repeat(tiny_llama: LlamaForCausalLM, name: str, mode: str) -> None:
    prepared = ready(tiny_llama, mode)
    first = brief(name).solve(prepared.network, prepared.run)
    for problem in prepared.network.problems:
        assert torch.equal(first.orders[problem.name].sort().values, torch.arange(problem.size))
    again = brief(name).search(prepared.network, dataclasses.replace(prepared.run, solved={}))
    assert same(first.orders, again.orders)


@pytest.mark.parametrize(
    "name", [name for name in PERMUTERS if name not in ("none", "ria", "reconstruction", "permllm")]
)
def test_another_seed_gives_other_orders(tiny_llama: LlamaForCausalLM, name: str) -> None:
    prepared = ready(tiny_llama)
    first = brief(name).search(prepared.network, prepared.run)
    other = brief(name).search(prepared.network, dataclasses.replace(prepared.run, seed=1, solved={}))
    assert not same(first.orders, other.orders)


def test_none_is_the_natural_order(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    assert same(brief("none").solve(prepared.network, prepared.run).orders, prepared.network.identity())


def test_ria_keeps_more_score_and_reconstruction_leaves_less_error(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    natural = prepared.network.measures()
    brief("ria").solve(prepared.network, prepared.run)
    assert sum(row["kept"] for row in prepared.network.measures()) > sum(row["kept"] for row in natural)
    Reconstruction().solve(prepared.network, prepared.run)
    assert sum(row["error"] for row in prepared.network.measures()) < sum(row["error"] for row in natural)


def test_cp_keeps_more_score_than_ria(tiny_llama: LlamaForCausalLM) -> None:
    network, run = (prepared := ready(tiny_llama)).network, prepared.run
    kept = {}
    for name in ("none", "ria", "cp"):
        brief(name).solve(network, run)
        kept[name] = sum(float((score * network.masks[layer]).sum()) for layer, score in network.scores.items())
    assert kept["none"] < kept["ria"] < kept["cp"]


def test_reconstruction_takes_the_candidates_that_held_out_text_prefers(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    losses = []
    for candidates in (1, 3):
        Reconstruction(candidates=candidates).solve(prepared.network, prepared.run)
        losses.append(prepared.network.loss(prepared.run.held_out, Objective()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("method", [Newton(rounds=4, examples=4), Learned(rounds=4, examples=4)])
def test_end_to_end_searches_never_end_above_their_start(tiny_llama: LlamaForCausalLM, method: TrustRegion) -> None:
    prepared = ready(tiny_llama)
    method.start.solve(prepared.network, prepared.run)
    start = prepared.network.loss(prepared.run.held_out, method.objective)
    solution = method.solve(prepared.network, prepared.run)
    assert any(point.kept for point in solution.curve[1:])
    assert prepared.network.loss(prepared.run.held_out, method.objective) < start
    kept = [point.loss for point in solution.curve if point.kept]
    assert kept == sorted(kept, reverse=True)
    assert prepared.network.loss(prepared.run.held_out, method.objective) == pytest.approx(kept[-1], abs=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        Newton(rounds=5, examples=2),
        Learned(rounds=5, examples=2),
        LearnedPaper(steps=5, examples=2, check=1, learning_rate=1.0),
    ],
)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_search_resumes_to_the_same_orders(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, method: Permuter, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ready(tiny_llama)
    whole = method.search(prepared.network, prepared.run)

    class Killed(Exception):
        pass

    save = Checkpoint.save
    saved = []

    def save_then_die(self: Checkpoint, *args: object) -> None:
        save(self, *args)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == stop:
            raise Killed

    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {"seed": 0}), solved={})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_then_die)
        with pytest.raises(Killed):
            method.search(prepared.network, run)
    prepared.network.set_orders(prepared.network.identity())
    resumed: Solution = method.search(prepared.network, dataclasses.replace(run, solved={}))
    assert same(whole.orders, resumed.orders)
    assert [(p.round, p.loss, p.kept) for p in resumed.curve] == [(p.round, p.loss, p.kept) for p in whole.curve]


def test_a_time_limit_ends_the_search_after_the_round_under_way(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    run = dataclasses.replace(prepared.run, minutes=1e-9)
    assert len(Newton(rounds=50, examples=2).search(prepared.network, run).curve) <= 2


def test_a_search_that_starts_from_another_does_not_repeat_it(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ready(tiny_llama)
    start = Newton.start
    start.solve(prepared.network, prepared.run)
    monkeypatch.setattr(type(start), "search", lambda *_: pytest.fail("searched again"))
    solution = Newton(rounds=1, examples=2).solve(prepared.network, prepared.run)
    assert solution.seconds >= prepared.run.solved[start].seconds


def test_an_unknown_permuter_lists_the_names() -> None:
    with pytest.raises(PermpruneError, match=r"reconstruction, .*newton"):
        permuter("hungarian")


def test_options_follow_a_permuters_name() -> None:
    assert permuter("newton:rounds=6:damping=8") == Newton(rounds=6, damping=8.0)
    assert permuter("newton") == Newton()


@pytest.mark.parametrize("name", ["newton:round=6", "newton:rounds", "newton:rounds=many", "newton:objective=1"])
def test_an_unknown_option_lists_those_of_the_method(name: str) -> None:
    with pytest.raises(PermpruneError, match=r"is no option of newton: give numbers for rounds=16, .*swaps=4"):
        permuter(name)
