"""The loop that iterative searches share: what callbacks are told, stopping, and losses of one's own."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare, prune
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.permuters.base import Permuter, Round
from permprune.permuters.cost_matrix import LearnedPaper
from permprune.permuters.learned import Learned
from permprune.permuters.trust_region import Newton
from permprune.system.search_state import Checkpoint

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
METHODS = [
    Newton(rounds=3, examples=4),
    LearnedPaper(steps=5, check=2, examples=2, learning_rate=1.0),
]


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, config, examples=WINDOWS)


def token_losses(model: nn.Module, batch: Examples) -> Tensor:
    """The cross-entropy of every next token."""
    ids = batch["input_ids"]
    logits = model(**batch).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def mean_loss(model: nn.Module, batch: Examples) -> Tensor:
    loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_callbacks_are_told_of_every_round(prepared: Prepared, method: Permuter) -> None:
    told: list[Round] = []
    run = dataclasses.replace(prepared.run, callbacks=(told.append,))
    solution = method.solve(prepared.network, run)
    total = told[0].total
    assert [own.number for own in told] == ([0, 2, 4, 5] if isinstance(method, LearnedPaper) else [0, 1, 2, 3])
    assert {own.method for own in told} == {method.name} and told[-1].number == total
    assert [own.best for own in told] == sorted((own.best for own in told), reverse=True)
    assert told[0].moved == 0 and all(own.kept or not own.moved for own in told if method in METHODS[:1])
    assert all(0 <= own.moved <= own.problems == len(prepared.outline.problems) for own in told)
    assert [own.seconds for own in told] == sorted(own.seconds for own in told)
    assert {own.seconds for own in told} <= {point.seconds for point in solution.curve}
    assert told[-1].best == pytest.approx(min(point.loss for point in solution.curve if point.kept))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("at", [0, 2])
def test_a_callback_stops_a_search_which_can_go_on(
    prepared: Prepared, tmp_path: Path, method: Permuter, at: int
) -> None:
    whole = method.search(prepared.network, dataclasses.replace(prepared.run, solved={}))
    run = dataclasses.replace(prepared.run, checkpoint=Checkpoint(tmp_path, {}), solved={})
    stopping = dataclasses.replace(run, callbacks=(lambda own: own.number == at,))
    stopped = method.solve(prepared.network, stopping)
    assert stopped.stopped and len(stopped.curve) < len(whole.curve)
    again = method.solve(prepared.network, dataclasses.replace(run, solved={}))
    assert not again.stopped and [p.loss for p in again.curve] == pytest.approx([p.loss for p in whole.curve])
    assert all(torch.equal(order, again.orders[name]) for name, order in whole.orders.items())


def test_what_a_callback_returns_but_true_stops_nothing(prepared: Prepared) -> None:
    run = dataclasses.replace(prepared.run, callbacks=(lambda own: 1, lambda own: None))  # type: ignore[arg-type, return-value]
    assert not Newton(rounds=1, examples=2).solve(prepared.network, run).stopped


@pytest.mark.parametrize("method", [Newton(rounds=2, examples=4), Learned(rounds=2, examples=4)], ids=repr)
def test_a_function_that_gives_the_tasks_losses_finds_the_tasks_orders(prepared: Prepared, method: Newton) -> None:
    plain = dataclasses.replace(method, objective=Objective(divergence=0.0))
    own = dataclasses.replace(method, objective=token_losses)
    expected, found = (each.search(prepared.network, prepared.run) for each in (plain, own))
    assert [p.loss for p in found.curve] == pytest.approx([p.loss for p in expected.curve], abs=1e-5)


def test_a_mean_loss_counts_an_example_as_a_term(prepared: Prepared) -> None:
    solution = Newton(rounds=3, examples=4, objective=mean_loss).search(prepared.network, prepared.run)
    network, held_out = prepared.network, prepared.run.held_out
    network.set_orders(solution.orders)
    assert solution.curve[-1].loss < solution.curve[0].loss
    assert min(p.loss for p in solution.curve) == pytest.approx(network.loss(held_out, Objective()), abs=1e-4)


def test_a_function_takes_part_in_the_record_by_its_name(tiny_llama: LlamaForCausalLM) -> None:
    method = Newton(rounds=1, examples=2, objective=token_losses)
    pruned = prune(tiny_llama, examples=WINDOWS, order=method, measured=6, held_out=4)
    assert "test_iterate.token_losses" in pruned.record().settings["order"]
    assert method.options()["objective"].endswith("test_iterate.token_losses")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, batch: 3.0, "returned 3.0: return a tensor"),
        (lambda model, batch: torch.zeros(()), "has no gradient: compute it from the model's outputs"),
    ],
)
def test_functions_that_are_no_losses_are_refused(prepared: Prepared, objective: object, message: str) -> None:
    with pytest.raises(PermpruneError, match=message):
        Newton(rounds=1, objective=objective).search(prepared.network, prepared.run)  # type: ignore[arg-type]


def test_what_is_neither_a_loss_nor_a_function_is_refused_at_once() -> None:
    with pytest.raises(PermpruneError, match="'kl' is not a loss: give an Objective, or a function of model and batch"):
        Newton(objective="kl")  # type: ignore[arg-type]
