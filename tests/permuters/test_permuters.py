"""All permuters on one tiny model: orders, repeatability, and what each promises to lower."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Loss, Objective
from permprune.permuters.base import Permuter, Run, Solution
from permprune.permuters.cost_matrix import CostMatrixLearner, LearnedPaper
from permprune.permuters.cp import CP
from permprune.permuters.iterate import Landscape
from permprune.permuters.learned import Learned
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.registry import PERMUTERS, permuter
from permprune.permuters.trust_region import DISCOUNT, LEAST_SLOPE, Newton, TrustRegion, TrustRegionState
from permprune.pruning.gradients import Gradients
from permprune.pruning.problem import Orders
from permprune.system.search_state import Checkpoint

from ..modalities import make, sentences

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))


def ready(model: LlamaForCausalLM, mode: str = "gather") -> Prepared:
    return prepare(model, None, PruneConfig(mode=mode, precision="fp32", measured=6, held_out=4), examples=WINDOWS)


def brief(name: str) -> Permuter:
    method = permuter(name)
    if isinstance(method, CP):
        return dataclasses.replace(method, escapes=10)
    if isinstance(method, CostMatrixLearner):
        return dataclasses.replace(method, steps=4, check=2, learning_rate=1.0)
    return dataclasses.replace(method, rounds=3, examples=4) if isinstance(method, TrustRegion) else method


def same(a: Orders, b: Orders) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FOLDED = ("ria", "reconstruction", "learned-paper", "newton")
"""One method of each kind of search: the mode decides on the problems, which all methods read in the same way."""

SLOW = ("learned", "permllm")
"""Methods that share the code of their search with a faster one, newton or learned-paper."""


@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PERMUTERS]
)
def test_orders_are_permutations_and_repeat(tiny_llama: LlamaForCausalLM, name: str, mode: str) -> None:
    prepared = ready(tiny_llama, mode)
    first = brief(name).solve(prepared.network, prepared.run)
    for problem in prepared.network.problems:
        assert torch.equal(first.orders[problem.name].sort().values, torch.arange(problem.size))
    again = brief(name).search(prepared.network, dataclasses.replace(prepared.run, solved={}))
    assert same(first.orders, again.orders)


@pytest.mark.slow
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
    assert sum(row.kept for row in prepared.network.measures()) > sum(row.kept for row in natural)
    Reconstruction().solve(prepared.network, prepared.run)
    assert sum(row.error for row in prepared.network.measures()) < sum(row.error for row in natural)


def test_cp_keeps_more_score_than_ria(tiny_llama: LlamaForCausalLM) -> None:
    network, run = (prepared := ready(tiny_llama)).network, prepared.run
    kept = {}
    for name in ("none", "ria", "cp"):
        brief(name).solve(network, run)
        kept[name] = sum(float((score * network.masks[layer]).sum()) for layer, score in network.scores.items())
    assert kept["none"] < kept["ria"] < kept["cp"]


@pytest.mark.slow
def test_reconstruction_takes_the_candidates_that_held_out_text_prefers(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    losses = []
    for candidates in (1, 3):
        Reconstruction(candidates=candidates).solve(prepared.network, prepared.run)
        losses.append(prepared.network.loss(prepared.run.held_out, Objective()))
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [Newton(rounds=4, examples=4), Learned(rounds=4, examples=4)],
)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        Newton(rounds=5, examples=2),
        Learned(rounds=5, examples=2),
        LearnedPaper(steps=5, examples=2, check=1, learning_rate=1.0),
    ],
)
def test_a_killed_search_resumes_to_the_same_orders(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, method: Permuter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ready(tiny_llama)
    whole = method.search(prepared.network, prepared.run)

    class Killed(Exception):
        pass

    save = Checkpoint.save
    for stop in (1, 3):
        saved: list[str] = []

        def save_then_die(
            self: Checkpoint, name: str, *args: Any, saved: list[str] = saved, stop: int = stop, **options: Any
        ) -> None:
            save(self, name, *args, **options)
            saved.append(name)
            if saved.count(method.name) == stop:
                raise Killed

        checkpoint = Checkpoint(tmp_path / str(stop), {"seed": 0})
        run = dataclasses.replace(prepared.run, checkpoint=checkpoint, solved={})
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_then_die)
            with pytest.raises(Killed):
                method.search(prepared.network, run)
        prepared.network.set_orders(prepared.network.identity())
        resumed: Solution = method.search(prepared.network, dataclasses.replace(run, solved={}))
        assert same(whole.orders, resumed.orders) and same(whole.weights, resumed.weights)
        assert [(p.round, p.loss, p.kept) for p in resumed.curve] == [(p.round, p.loss, p.kept) for p in whole.curve]


@pytest.mark.slow
def test_a_search_goes_on_for_more_rounds_but_not_with_other_options(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    prepared = ready(tiny_llama)
    whole = Newton(rounds=3, examples=4).search(prepared.network, prepared.run)
    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {"seed": 0}), solved={})
    Newton(rounds=2, examples=4).search(prepared.network, run)
    assert same(Newton(rounds=3, examples=4).search(prepared.network, run).orders, whole.orders)
    with pytest.raises(PermpruneError, match="another swaps"):
        Newton(rounds=3, examples=4, swaps=2).search(prepared.network, run)


@pytest.mark.slow
def test_a_time_limit_ends_the_search_after_the_round_under_way(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    run = dataclasses.replace(prepared.run, minutes=1e-9)
    assert len(Newton(rounds=50, examples=2).search(prepared.network, run).curve) <= 2


@pytest.mark.slow
def test_a_search_that_starts_from_another_does_not_repeat_it(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ready(tiny_llama)
    start = Newton.start
    found = start.solve(prepared.network, prepared.run)
    monkeypatch.setattr(type(start), "search", lambda *_: pytest.fail("searched again"))
    solution = Newton(rounds=1, examples=2).solve(prepared.network, prepared.run)
    assert solution.seconds >= found.seconds


def begun(prepared: Prepared, name: str, damping: float) -> tuple[TrustRegion, Landscape, TrustRegionState]:
    """A method, and a search by it that has found where to begin."""
    method = dataclasses.replace(permuter(name), damping=damping, examples=4)
    assert isinstance(method, TrustRegion)
    landscape = Landscape.of(prepared.network, prepared.run, method.objective)
    return method, landscape, method.init(landscape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newton", "learned"])
def test_no_step_is_predicted_to_gain_more_than_the_loss(tiny_llama: LlamaForCausalLM, name: str) -> None:
    method, landscape, state = begun(ready(tiny_llama), name, damping=15.0)
    gradients = method.gradients(landscape, state)

    def predicted(best: float) -> tuple[float, set[float]]:
        proposals, damping = method.proposals(landscape, dataclasses.replace(state, best=best), gradients)
        return sum(proposal.predicted_change for proposal in proposals.values()), set(damping.values())

    first, damping = predicted(1e9)
    assert damping == {15.0} and first < 0
    change, (factor,) = predicted(-first / 3)
    assert first / 3 <= change < 0 and factor > 15.0


@pytest.mark.slow
def test_a_step_depends_on_nothing_but_the_state(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    method = Newton(rounds=4, examples=4)
    landscape = Landscape.of(prepared.network, prepared.run, method.objective)
    states = [method.init(landscape)]
    while not method.done(landscape, states[-1]):
        states.append(method.step(landscape, states[-1]))
    for before, after in itertools.pairwise(states):
        again = method.step(landscape, before)
        assert same(again.orders, after.orders)
        assert [point.loss for point in again.curve] == [point.loss for point in after.curve]
        assert (again.damping, again.slopes) == (after.damping, after.slopes)


def test_earlier_gradients_count_less_after_each_step_and_not_after_the_first(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, landscape, state = begun(ready(tiny_llama), "newton", damping=15.0)
    gradients, counts = landscape.network.gradients, list[int | None]()

    def counted(examples: Examples, loss: Loss, mean: Gradients | None = None) -> Gradients:
        counts.append(mean and mean.count)
        return gradients(examples, loss, mean)

    monkeypatch.setattr(landscape.network, "gradients", counted)
    for kept in (True, True, True, False, True):
        best = state.best
        monkeypatch.setattr(landscape, "held_out_loss", lambda loss=best + (-0.01 if kept else 0.01): loss)
        state = method.step(landscape, state)
        assert bool(state.moved) == kept
    each = method.examples * (WINDOWS.shape[1] - 1)
    once = round(DISCOUNT * each)
    twice = round(DISCOUNT * (each + once))
    assert counts == [None, 0, once, twice, each + twice]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newton", "learned"])
def test_a_step_much_too_far_damps_each_problem_by_its_slopes_and_is_taken_again(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prepared = ready(tiny_llama)
    network = prepared.network
    method, landscape, state = begun(prepared, name, damping=0.01)
    network.set_orders(network.identity())
    state = dataclasses.replace(state, orders=network.orders)
    gradients = method.gradients(landscape, state)
    proposals, before = method.proposals(landscape, state, gradients)
    orders = {name: proposal.order for name, proposal in proposals.items()}
    slopes = network.slopes_along(network.identity(), orders, gradients.weight)
    losses = iter([state.best + 1e3, state.best - 1])
    monkeypatch.setattr(network, "slopes", lambda *_: {own: -2 * slope for own, slope in slopes.items()})
    monkeypatch.setattr(network, "loss", lambda *_: next(losses))
    trial = method.trial(landscape, dataclasses.replace(state, damping=before), gradients)
    assert trial.loss == state.best - 1 and next(losses, None) is None
    moving = {own for own, slope in slopes.items() if slope < -LEAST_SLOPE}
    assert moving
    for own, damping in trial.damping.items():
        assert damping == pytest.approx(before[own] * (3 if own in moving else 1))


def test_a_search_begins_in_natural_order_where_its_start_is_worse(tiny_llama: LlamaForCausalLM) -> None:
    prepared = ready(tiny_llama)
    network, run = prepared.network, prepared.run
    started = {}
    for name in ("none", "ria", "random"):
        solution = Newton(rounds=0, start=permuter(name)).solve(network, run)
        started[name] = solution.curve[0].loss
        own = permuter(name).solve(network, run).orders
        assert same(solution.orders, own) or same(solution.orders, network.identity())
        network.set_orders(solution.orders)
        assert started[name] == network.loss(run.held_out, Objective())
    assert max(started.values()) == started["none"]


@pytest.mark.parametrize("method", [Newton(rounds=2, examples=2), LearnedPaper(steps=2)], ids=repr)
def test_without_an_order_to_search_for_there_are_no_rounds(method: Permuter, caplog: pytest.LogCaptureFixture) -> None:
    config = PruneConfig(mode="fold", exclude=("*dense*",), precision="fp32", measured=4, held_out=2)
    encoder = make("bert").bert  # which returns what the layers read that are left
    prepared = prepare(encoder, None, config, examples=sentences(labels=False))
    assert prepared.network.layers and not prepared.network.problems
    solution = method.solve(prepared.network, prepared.run)
    assert not solution.orders and len(solution.curve) == 1
    assert f"{method.name}: there is no order to search for" in caplog.messages


def test_an_unknown_permuter_lists_the_names() -> None:
    with pytest.raises(PermpruneError, match=r"reconstruction, .*newton"):
        permuter("hungarian")


def test_options_follow_a_permuters_name() -> None:
    assert permuter("newton:rounds=6:damping=8") == Newton(rounds=6, damping=8.0)
    assert permuter("newton") == Newton()
    assert permuter("newton:distillation=1e-4:rounds=6") == Newton(rounds=6, objective=Objective(distillation=1e-4))
    assert permuter("learned:task=0:divergence=1").objective == Objective(0.0, 1.0, distillation=1e-5)
    assert permuter("newton:rounds=6").objective.divergence is None


@pytest.mark.parametrize("name", ["newton:round=6", "newton:rounds", "newton:", "newton:objective=1"])
def test_an_unknown_option_lists_those_of_the_method(name: str) -> None:
    with pytest.raises(PermpruneError, match=r"is not an option of newton: give numbers for rounds=16, .*swaps=4"):
        permuter(name)


def test_passes_after_the_first_cut_texts_that_the_dense_model_gives_targets_for() -> None:
    mask = torch.ones(6, 40, dtype=torch.int64)
    texts = Examples({"input_ids": torch.arange(6 * 40).view(6, 40), "attention_mask": mask})
    run = Run(texts, texts[:1], seed=3)
    first, again, later = (run.varied_batch(number, 3) for number in (1, 3, 5))
    assert torch.equal(first["input_ids"], texts["input_ids"][3:])
    assert again["attention_mask"].sum() < 120 and not torch.equal(again["attention_mask"], later["attention_mask"])
    assert torch.equal(again["attention_mask"], Run(texts, texts[:1], seed=3).varied_batch(3, 3)["attention_mask"])
