"""Weights that are held in bf16 while the model computes as in fp32."""

import copy
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.origin import Origin, set_origin
from permprune.checkpoints.source import open_model
from permprune.config import PruneConfig
from permprune.engine.held import Prepared, prepare, prune
from permprune.engine.measuring import Evaluation
from permprune.examples import Examples
from permprune.jobs.prune import prune_to_folder
from permprune.losses.objective import Objective
from permprune.models.hooks import attached
from permprune.models.layers import prunable_layers
from permprune.models.narrow_weights import NarrowWeights
from permprune.models.narrow_weights import held_bytes as held_bytes_of_a_run
from permprune.pattern import Pattern
from permprune.permuters.trust_region import Newton

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
        held = NarrowWeights.of(model, [], torch.bfloat16)
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
    held = NarrowWeights.of(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
    assert 2 * held_bytes(model) == held_bytes(expected)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(model, dtype), logits(expected, dtype))
    held.release()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert torch.equal(logits(model, torch.float32), logits(expected, torch.float32))


def test_fp32_is_back_when_the_holder_is_gone() -> None:
    model, expected = as_read(), as_read()
    held = NarrowWeights.of(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
    del held
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_an_interrupted_pass_leaves_no_other_weight() -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    model, expected = as_read(), as_read()
    layers = prunable_layers(model, Pattern(2, 4))
    held = NarrowWeights.of(model, layers, torch.bfloat16)
    with pytest.raises(KeyboardInterrupt), attached([layers[2].module.register_forward_pre_hook(interrupt)]):
        logits(model, torch.float32)
    held.release()
    assert all(isinstance(layer.stored, torch.nn.Parameter) for layer in layers)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_no_value_changes() -> None:
    """Only what bf16 represents is held in it, and nothing of a model that is stored in another type."""
    model = as_read()
    layers = prunable_layers(model, Pattern(2, 4))
    layers[0].weight[0, 0] = 1 / 3
    held = NarrowWeights.of(model, layers, torch.bfloat16)
    assert layers[0].weight.dtype == torch.float32 and held.types.keys() == {layer.parameter for layer in layers[1:]}
    assert not NarrowWeights.of(as_read(), prunable_layers(as_read(), Pattern(2, 4)), torch.float32).types


def test_parameters_of_two_modules_stay_in_fp32() -> None:
    model = as_read()
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    held = NarrowWeights.of(model, prunable_layers(model, Pattern(2, 4)), torch.bfloat16)
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
    done = prune(model, config=SETTINGS, examples=WINDOWS, order=Newton(rounds=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    natural = prune(stored_in_bf16(), config=SETTINGS, examples=WINDOWS, order="none")
    assert done.solution.curve[-1].loss < done.solution.curve[0].loss
    assert torch.equal(logits(copy.deepcopy(natural.model), torch.float32), logits(natural.model, torch.float32))


def test_updated_weights_are_rounded_when_they_are_written() -> None:
    network = prepared(stored_in_bf16()).network
    name = next(iter(network.layers))
    changed = network.shown[name] * (1 + 2**-12)
    network.show({name: changed})
    assert torch.equal(network.shown[name], changed)
    network.write()
    assert torch.equal(network.layers[name].weight, changed.bfloat16())
    network.held.release()
    assert torch.equal(network.layers[name].weight, changed.bfloat16().float())


@pytest.fixture
def narrow_checkpoint(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint in bf16."""
    make_tiny_llama().bfloat16().save_pretrained(tmp_path / "narrow")
    tiny_tokenizer.save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def test_a_model_is_read_in_the_type_of_its_checkpoint(narrow_checkpoint: Path) -> None:
    opened, whole = open_model(str(narrow_checkpoint), narrow=True), permprune.read_model(str(narrow_checkpoint))[0]
    model, held = opened.model, opened.held
    assert held is not None and held.active
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == held_bytes_of_a_run(whole, torch.bfloat16)
    assert isinstance(whole, LlamaForCausalLM) and isinstance(model, LlamaForCausalLM)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(model, dtype), logits(whole, dtype))
    with held.as_stored():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        traced = copy.deepcopy(model)
    assert torch.equal(logits(model, torch.float32), logits(whole, torch.float32))
    held.release()
    assert torch.equal(model(**WINDOWS[:2]).logits, traced(**WINDOWS[:2]).logits)
    assert not NarrowWeights.as_read(make_tiny_llama()).active


def test_a_run_from_the_checkpoint_is_that_of_the_model_in_fp32(
    narrow_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    config = SETTINGS.replace(
        order="newton:rounds=1", train="steps=1:blocks=true", calibration=str(tiny_text), length=16, samples=24
    )
    model, tokenizer, _ = permprune.read_model(str(narrow_checkpoint))
    evaluation = Evaluation(str(tiny_text), 4, 16)
    whole = prune_to_folder(model, tmp_path / "whole", config, evaluation=evaluation, processor=tokenizer)
    once = prune_to_folder(str(narrow_checkpoint), tmp_path / "once", config, evaluation=evaluation)
    assert once.permutations == whole.permutations and once.measured == whole.measured
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "once"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
