"""Weights that are held in bf16 while the model computes as in fp32."""

import copy

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from permprune.checkpoints.origin import Origin, set_origin
from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare, prune
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.models.layers import prunable_layers
from permprune.models.narrow_weights import NarrowWeights
from permprune.pattern import Pattern
from permprune.permuters.newton import Newton

from ..fixtures import make_tiny_llama

WINDOWS = Examples.of(torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0)))
SETTINGS = PruneConfig(precision="fp32", measured=4, held_out=2)


def as_read() -> LlamaForCausalLM:
    """A model with weights that bf16 represents, in fp32, as `read_model` returns it."""
    return make_tiny_llama().bfloat16().float()


def stored_in_bf16() -> LlamaForCausalLM:
    model = as_read()
    set_origin(model, Origin("tiny", torch.bfloat16))
    return model


def logits(model: LlamaForCausalLM, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found: Tensor = model(**WINDOWS[:2]).logits
    return found


def test_embeddings_and_head_compute_as_in_fp32() -> None:
    for tied in (True, False):
        model, expected = as_read(), as_read()
        if not tied:
            for one in (model, expected):
                one.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.detach().flip(0))
        held = NarrowWeights(model, [], torch.bfloat16)
        assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(logits(model, dtype), logits(expected, dtype))
        assert model.model.embed_tokens(torch.tensor([[1]])).dtype == torch.float32
        held.release()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert all(map(torch.equal, model.parameters(), expected.parameters()))


def held_bytes(model: LlamaForCausalLM) -> int:
    return sum(layer.weight.nbytes for layer in prunable_layers(model, Pattern(2, 4)))


def test_the_model_computes_as_in_fp32() -> None:
    model, expected = as_read(), as_read()
    held = NarrowWeights(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
    assert 2 * held_bytes(model) == held_bytes(expected)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(model, dtype), logits(expected, dtype))
    held.release()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert torch.equal(logits(model, torch.float32), logits(expected, torch.float32))


def test_fp32_is_back_when_the_holder_is_gone() -> None:
    model, expected = as_read(), as_read()
    held = NarrowWeights(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
    del held
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_no_value_changes() -> None:
    """Only what bf16 represents is held in it, and nothing of a model that is stored in another type."""
    model = as_read()
    layers = prunable_layers(model, Pattern(2, 4))
    layers[0].weight[0, 0] = 1 / 3
    held = NarrowWeights(model, layers, torch.bfloat16)
    assert layers[0].weight.dtype == torch.float32 and held.types.keys() == {layer.parameter for layer in layers[1:]}
    assert not NarrowWeights(as_read(), prunable_layers(as_read(), Pattern(2, 4)), torch.float32).types


def test_parameters_of_two_modules_stay_in_fp32() -> None:
    model = as_read()
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    held = NarrowWeights(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
    assert held.types and not any("up_proj" in name and "0" in name for name in held.types)
    logits(model, torch.float32)


def prepared(model: LlamaForCausalLM) -> Prepared:
    return prepare(model, None, SETTINGS, examples=WINDOWS)


def test_a_network_has_the_same_masks_and_losses() -> None:
    narrow, wide = prepared(stored_in_bf16()), prepared(as_read())
    assert 2 * held_bytes(narrow.model) == held_bytes(wide.model)
    assert narrow.network.statistics.moments.nbytes < 0.6 * wide.network.statistics.moments.nbytes
    for name in wide.network.layers:
        assert torch.equal(narrow.network.masks[name], wide.network.masks[name])
        assert torch.equal(narrow.network.dense[name], wide.network.dense[name])
        assert narrow.network.dense[name].dtype == narrow.network.shown[name].dtype == torch.float32
    assert narrow.network.loss(WINDOWS[:6], Objective()) == wide.network.loss(WINDOWS[:6], Objective())
    one, other = (side.network.gradients(WINDOWS[:6], Objective()) for side in (narrow, wide))
    for name, gradient in one.weight.items():
        assert gradient.dtype == torch.bfloat16 and one.fisher[name].dtype == torch.float32
        assert (gradient - other.weight[name]).norm() < 1e-2 * other.weight[name].norm()
        torch.testing.assert_close(one.fisher[name], other.fisher[name])
    with narrow.network.dense_weights():
        assert torch.equal(logits(narrow.model, torch.float32), logits(as_read(), torch.float32))


def test_a_pruned_model_is_fp32_again() -> None:
    model = stored_in_bf16()
    done = prune(model, config=SETTINGS, examples=WINDOWS, permute=Newton(rounds=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    natural = prune(stored_in_bf16(), config=SETTINGS, examples=WINDOWS, permute="none")
    assert done.solution.curve[-1].loss < done.solution.curve[0].loss
    assert torch.equal(logits(copy.deepcopy(natural.model), torch.float32), logits(natural.model, torch.float32))


def test_updated_weights_are_not_rounded() -> None:
    network = prepared(stored_in_bf16()).network
    name = next(iter(network.layers))
    changed = network.shown[name] * (1 + 2**-12)
    network.show({name: changed})
    assert torch.equal(network.shown[name], changed)
    model = network.model
    network.write()
    assert torch.equal(network.layers[name].weight, changed) and logits(model, torch.float32).isfinite().all()
