"""Adapters train a masked matrix through two thin ones and leave a plain model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from permprune.models.layers import block_linears
from permprune.training.weights import Adapter, adapted

from ..experts import make as make_experts
from ..modalities import make

IDS = torch.arange(24).view(2, 12)


def transposed() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for layer in block_linears(model):
            layer.weight[:, ::2] = 0
    return model


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "transposed", "gpt-oss"])
def test_zeros_stay_and_the_change_has_the_rank(kind: str, stored: torch.dtype) -> None:
    model = pruned(
        {"transposed": transposed, "gpt-oss": lambda: make_experts("gpt-oss")}.get(kind, lambda: make(kind))()
    )
    model = model.to(stored).float()
    names, layers = list(model.state_dict()), block_linears(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(input_ids=IDS).logits
    with adapted(model, layers, rank=3, seed=0) as weights:
        torch.testing.assert_close(model(input_ids=IDS).logits, plain)
        assert {layer.stored.dtype for layer in layers} == {torch.float32}  # which they run with
        held = {name: weight.dtype for name, weight in model.named_parameters() if name.endswith(".original")}
        assert set(held.values()) == {stored}
        adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
        assert {p for module in adapters.values() for p in module.parameters()} == set(weights.values())
        optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2)
        for _ in range(2):
            model(input_ids=IDS).logits.square().mean().backward()
            optimizer.step()
        expected = {
            name.replace(".parametrizations", "").rpartition(".")[0]: module.left @ module.right
            for name, module in adapters.items()
        }
        last = model(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, last)
    after = model.state_dict()
    assert sorted(after) == sorted(names) and not any(isinstance(module, Adapter) for module in model.modules())
    assert expected.keys() == {layer.parameter for layer in layers}
    for name, tensor in after.items():
        if name in expected:
            change = expected[name] * (before[name] != 0)
            torch.testing.assert_close(tensor, before[name] + change)
            assert change.any() and int(torch.linalg.matrix_rank(expected[name]).max()) <= 3
            assert torch.equal(tensor == 0, before[name] == 0)
        else:
            assert torch.equal(tensor, before[name])
    assert all(isinstance(layer.stored, torch.nn.Parameter) for layer in block_linears(model))


def test_after_an_error_the_weights_are_as_before() -> None:
    model = make("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), adapted(model, block_linears(model), rank=2, seed=0) as weights:
        with torch.no_grad():
            for weight in weights.values():
                weight.fill_(1.0)
        raise RuntimeError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_start() -> None:
    model = make("bert")
    starts = []
    for seed in (0, 0, 1):
        with adapted(model, block_linears(model), rank=2, seed=seed) as weights:
            starts.append({name: weight.detach().clone() for name, weight in weights.items()})
    assert all(torch.equal(starts[0][name], weight) for name, weight in starts[1].items())
    assert any(not torch.equal(starts[0][name], weight) for name, weight in starts[2].items())
