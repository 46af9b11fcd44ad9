"""Training of one block after the other."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare
from permprune.models.hooks import attached
from permprune.models.layers import blocks
from permprune.permuters.base import Identity
from permprune.pruning.network import PrunedNetwork
from permprune.recipe import Recipe
from permprune.system.search_state import Checkpoint, Resumable
from permprune.training.blocks import Chain, trained_blocks
from permprune.training.train import Training
from permprune.updates.methods import NoUpdate

from ..modalities import EXAMPLES, make

WINDOWS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(Identity(), NoUpdate(), Training(steps=2, blocks=True))


@pytest.fixture
def prepared(tiny_llama: LlamaForCausalLM) -> Prepared:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    return prepare(tiny_llama, None, config, examples=WINDOWS)


def trained(prepared: Prepared, steps: int) -> dict[str, Tensor]:
    found = trained_blocks(prepared.network, prepared.run, steps, Resumable(Checkpoint(None, {}), "blocks"))
    return {name: found[name].clone() for name in found}


@torch.no_grad()
def outputs(network: PrunedNetwork, tokens: Tensor) -> list[Tensor]:
    """What the blocks compute of some tokens."""
    found: list[Tensor] = []
    with attached(block.register_forward_hook(lambda *call: found.append(call[-1])) for block in blocks(network.model)):
        network.model(tokens)
    return found


def errors(network: PrunedNetwork, tokens: Tensor) -> list[float]:
    """The relative distances of the blocks' outputs to the dense model's."""
    pruned = outputs(network, tokens)
    with network.dense_weights():
        pairs = zip(pruned, outputs(network, tokens), strict=True)
    return [float((one - other).square().sum() / other.square().sum()) for one, other in pairs]


def test_the_error_of_every_block_falls_and_only_kept_weights_change(prepared: Prepared) -> None:
    network, tokens = prepared.network, prepared.run.train["input_ids"][:10]
    before, masks = errors(network, tokens), {name: mask.clone() for name, mask in network.masks.items()}
    dense = {name: weight.clone() for name, weight in network.weights.items()}
    weights = trained(prepared, 20)
    assert errors(network, tokens) == before  # the network keeps its own
    for name, weight in weights.items():
        assert torch.equal(weight[~masks[name]], dense[name][~masks[name]])
        assert not torch.equal(weight[masks[name]], dense[name][masks[name]])
    network.set_weights(weights)
    after = errors(network, tokens)
    assert all(new < 0.8 * old for new, old in zip(after, before, strict=True)), (before, after)


def test_the_same_twice(tiny_llama: LlamaForCausalLM) -> None:
    config = PruneConfig(mode="gather", precision="fp32", measured=6, held_out=4)
    one, other = (trained(prepare(tiny_llama, None, config, examples=WINDOWS), 3) for _ in range(2))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_passes_go_on_from_block_to_block(prepared: Prepared) -> None:
    network, windows = prepared.network, [prepared.run.batch(number, 1) for number in range(2)]
    chain, every = Chain(network, windows), blocks(network.model)
    for number, block in enumerate(every, 1):
        chain.go_on(every[:number])
        for window, (computed,) in zip(windows, chain.of(block), strict=True):
            torch.testing.assert_close(computed, outputs(network, window["input_ids"])[number - 1])


def test_blocks_end_with_the_time_limit_and_go_on_with_a_longer_one(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Resumable):
        """Each look at the clock takes an hour."""

        hours = 0

        @property
        def seconds(self) -> float:
            self.hours += 1
            return 3600.0 * self.hours

    network, run, whole = prepared.network, prepared.run, trained(prepared, 3)
    part = trained_blocks(network, run, 3, Slow(Checkpoint(tmp_path, {}), "blocks"), limit=5000.0)
    assert caplog.messages[-1] == "blocks: no time is left: 1 of 2 were trained"
    assert {name for name in part if torch.equal(part[name], whole[name])} == {name for name in whole if ".0." in name}
    rest = trained_blocks(network, run, 3, Resumable(Checkpoint(tmp_path, {}), "blocks"))
    assert all(torch.equal(rest[name], weight) for name, weight in whole.items())


def test_weights_stay_where_the_error_does_not_fall(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("permprune.training.blocks.RATE", 1e4)
    dense = {name: weight.clone() for name, weight in prepared.network.weights.items()}
    weights = trained(prepared, 4)
    assert caplog.text.count("its weights are as before") == len(blocks(prepared.network.model))
    assert all(torch.equal(weight, dense[name]) for name, weight in weights.items())


def test_a_model_that_does_not_go_on_from_block_to_block_is_left_as_it_is(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    network = prepared.network
    numbers = itertools.count()

    def differ(_block: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + next(numbers)

    with attached([blocks(network.model)[-1].register_forward_hook(differ)]):
        solution = RECIPE.solve(network, prepared.run)
    assert [point.stage for point in solution.curve] == ["search", "training"]
    assert "does not go on from one block to the next" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("data", EXAMPLES)
def test_every_kind_of_model_is_trained_by_blocks(data: str, recompute: bool) -> None:
    config = PruneConfig(mode="gather", precision="fp32", measured=4, held_out=2, recompute=recompute)
    prepared = prepare(make(data), None, config, examples=EXAMPLES[data]())
    before = {name: weight.clone() for name, weight in prepared.network.weights.items()}
    weights = trained(prepared, 4)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())
