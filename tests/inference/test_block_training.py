"""Training of blocks through int4: it brings a model nearer to what it computed, and changes no zero and no scale."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from permprune.examples import Examples
from permprune.inference import solving
from permprune.inference.solved import Solved
from permprune.inference.solving import BlockTraining, solve_each
from permprune.models.autocast import fast
from permprune.models.forward import frozen, inference, run_model
from permprune.models.hooks import attached
from permprune.models.layers import Layer, blocks, prunable_layers
from permprune.pattern import Pattern

from ..modalities import EXAMPLES, make
from .test_pack import prune_to, say

TOKENS = torch.randint(90, (26, 24), generator=torch.Generator().manual_seed(0))


def untrained(_self: BlockTraining, _call: Any, _target: Tensor, solved: dict[Layer, Solved], _types: Any) -> Any:
    return solved


def solved_by_layer(model: nn.Module, examples: Examples) -> dict[str, Solved]:
    """Solve the layers of a model, which then runs with their values."""
    found: dict[str, Solved] = {}

    def take(layer: Layer, solved: Solved) -> None:
        layer.weight.copy_(solved.values)
        found[layer.name] = solved

    layers = {layer.name: layer for layer in prunable_layers(model, Pattern(2, 4))}
    solve_each(model, layers, dict.fromkeys(layers, Pattern(2, 4)), examples, take)
    return found


def test_training_brings_outputs_nearer(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_to(tiny_llama)
    zeros = {layer.name: layer.weight == 0 for layer in prunable_layers(tiny_llama, Pattern(2, 4))}
    expected, errors = say(tiny_llama, input_ids=TOKENS), []
    trained, again, solved = (copy.deepcopy(tiny_llama) for _ in range(3))
    values = solved_by_layer(trained, Examples.of(TOKENS))
    same = solved_by_layer(again, Examples.of(TOKENS))
    for name, one in values.items():
        assert not one.values[zeros[name]].any() and not one.targets[zeros[name]].any()
        assert torch.equal(one.stored(one.targets), one.values)
        assert torch.equal(one.values, same[name].values)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())
    monkeypatch.setattr(BlockTraining, "train", untrained)
    before = solved_by_layer(solved, Examples.of(TOKENS))
    first = [name for name in values if ".0." in name]  # what they read is the same with training and without
    assert all(torch.equal(values[name].scale, before[name].scale) for name in first)
    for model in (trained, solved):
        errors.append(float((say(model, input_ids=TOKENS) - expected).square().sum()))
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("data", ["text", "images"])
def test_a_block_is_trained_for_what_it_computed_before(
    data: str, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = (tiny_llama, Examples.of(TOKENS)) if data == "text" else (make("vit"), EXAMPLES["vit"]())
    prune_to(model)
    expected: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda *call: expected.append(call[-1] if torch.is_tensor(call[-1]) else call[-1][0])
        )
        for block in blocks(model)
    ]
    with fast(model), frozen(model), inference(model), attached(hooks):
        run_model(model, examples)
    found: list[Tensor] = []
    train = BlockTraining.train

    def see(self: BlockTraining, call: Any, target: Tensor, *rest: Any) -> Any:
        found.append(target)
        return train(self, call, target, *rest)

    monkeypatch.setattr(BlockTraining, "train", see)
    solved_by_layer(model, examples)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_training_that_does_not_help_is_undone(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_to(tiny_llama)
    one, other = tiny_llama, copy.deepcopy(tiny_llama)
    monkeypatch.setattr(solving, "RATE", 10.0)
    values = solved_by_layer(one, Examples.of(TOKENS))
    monkeypatch.setattr(BlockTraining, "train", untrained)
    assert all(
        torch.equal(values[name].values, same.values)
        for name, same in solved_by_layer(other, Examples.of(TOKENS)).items()
    )


def mixing(forward: Any, x: Tensor, *args: Any, **named: Any) -> Any:
    return forward(x + x.mean(0, keepdim=True), *args, **named)


def cutting(forward: Any, *args: Any, **named: Any) -> Any:
    return forward(*args, **named).detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixing, "blocks that do not compute examples one by one are solved, and not trained"),
        (cutting, ".0.self_attn.q_proj no nearer: its values are as solved"),
    ],
)
def test_blocks_that_cannot_be_trained_are_solved(
    change: Any,
    message: str,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="permprune")
    prune_to(tiny_llama)
    one, other = tiny_llama, copy.deepcopy(tiny_llama)
    for block in (*blocks(one), *blocks(other)):
        block.forward = partial(change, block.forward)
    values = solved_by_layer(one, Examples.of(TOKENS))
    assert caplog.text.count(message) == 1
    monkeypatch.setattr(BlockTraining, "train", untrained)
    assert all(
        torch.equal(values[name].values, same.values)
        for name, same in solved_by_layer(other, Examples.of(TOKENS)).items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("data", EXAMPLES)
def test_every_kind_of_model_is_trained(
    data: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make(data), make(data)
    values = []
    for one in (model, other):
        prune_to(one)
        values.append(solved_by_layer(one, EXAMPLES[data]()))
        monkeypatch.setattr(BlockTraining, "train", untrained)
    assert not caplog.messages and len(values[0]) == len(prunable_layers(model, Pattern(2, 4)))
    changed = [name for name, one in values[0].items() if not torch.equal(one.values, values[1][name].values)]
    assert len(changed) > len(values[0]) / 2
