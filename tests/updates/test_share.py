"""Which of the choices of an update is taken."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.examples import Examples
from permprune.losses.objective import ONE_LABEL_DIVERGENCE, Objective, TeacherOutputs
from permprune.permuters.base import Random
from permprune.pruning.network import PrunedNetwork
from permprune.system.shelf import Place, Shelf
from permprune.updates.base import Update
from permprune.updates.methods import ADMM, NoUpdate, SparseGPT
from permprune.updates.share import SHARES, update_network

from ..modalities import make, sentences

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


class Towards(Update):
    """Goes from the masked weights to `target` times them; with masks of its own to `alone` times them."""

    name = "towards"

    def __init__(self, target: float, alone: float = 0.0) -> None:
        object.__setattr__(self, "factors", (alone, target))

    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        factor = self.factors[masks is not None]
        network.show({name: factor * weight * network.masks[name] for name, weight in network.dense.items()})


def ready(model: LlamaForCausalLM) -> Prepared:
    prepared = prepare(model, None, PruneConfig(precision="fp32"), examples=WINDOWS)
    Random().solve(prepared.network, prepared.run)
    return prepared


def shown(network: PrunedNetwork) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network.shown.items()}


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize(("alone", "target"), [(0.0, 1.5), (1.5, -1.5)])
def test_the_choice_with_the_least_held_out_loss_is_taken(
    tiny_llama: LlamaForCausalLM, place: Place, alone: float, target: float
) -> None:
    prepared = ready(tiny_llama)
    network, held_out = prepared.network, prepared.run.held_out
    network.shelf = Shelf(place)
    network.set_weights({})
    masked = {name: weight * network.masks[name] for name, weight in network.dense.items()}
    losses = {}
    for factor in (alone, 1.0, *(1 + share * (target - 1) for share in SHARES)):
        network.show({name: factor * weight for name, weight in masked.items()})
        losses[factor] = network.loss(held_out, Objective())
    update_network(Towards(target, alone), network, prepared.measured, held_out)
    best = min(losses, key=losses.__getitem__)
    for name, weight in shown(network).items():
        torch.testing.assert_close(weight, best * masked[name])


def test_beside_labels_that_stand_alone_the_divergence_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make("bert"), None, PruneConfig(precision="fp32"), examples=sentences())
    asked, loss = [], PrunedNetwork.loss

    def spy(
        network: PrunedNetwork, examples: Examples, objective: Objective, teacher_outputs: list[TeacherOutputs] | None
    ) -> float:
        asked.append(objective)
        return loss(network, examples, objective, teacher_outputs)

    monkeypatch.setattr(PrunedNetwork, "loss", spy)
    update_network(Towards(1.5), prepared.network, prepared.measured, prepared.run.held_out)
    assert asked == [Objective(divergence=ONE_LABEL_DIVERGENCE)] * (2 + len(SHARES))


@pytest.mark.parametrize("target", [float("nan"), -50.0])
def test_an_update_that_only_harms_is_left(tiny_llama: LlamaForCausalLM, target: float) -> None:
    prepared = ready(tiny_llama)
    network = prepared.network
    with torch.no_grad():  # so that zero weights are no good either
        tiny_llama.lm_head.weight.mul_(0.0)
    update_network(Towards(target), network, prepared.measured, prepared.run.held_out)
    for name, weight in shown(network).items():
        assert torch.equal(weight, network.dense[name] * network.masks[name])


@pytest.mark.parametrize(("mode", "method"), [("fold", SparseGPT()), ("gather", SparseGPT()), ("gather", ADMM())])
def test_what_is_taken_holds_the_pattern_and_lasts_until_orders_are_set(
    tiny_llama: LlamaForCausalLM, mode: str, method: Update
) -> None:
    prepared = prepare(tiny_llama, None, PruneConfig(precision="fp32", mode=mode), examples=WINDOWS)
    network = prepared.network
    Random().solve(network, prepared.run)
    before = network.loss(prepared.run.held_out, Objective())
    update_network(method, network, prepared.measured, prepared.run.held_out)
    assert network.loss(prepared.run.held_out, Objective()) <= before
    columns = network.stored_columns()
    assert all(network.patterns[name].holds(weight[:, columns[name]]) for name, weight in shown(network).items())
    network.set_orders({})
    assert network.loss(prepared.run.held_out, Objective()) == before


def test_no_update_measures_nothing(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ready(tiny_llama)
    monkeypatch.setattr(PrunedNetwork, "loss", None)
    update_network(NoUpdate(), prepared.network, prepared.measured, prepared.run.held_out)
