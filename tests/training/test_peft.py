"""Adapters of PEFT on folded and packed models."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import permprune
from permprune.checkpoints.origin import held_patterns
from permprune.kernels.product.module import PackedLinear
from permprune.models.layers import block_linears

from ..faults.pruned import WINDOWS
from ..inference.test_pack import prune_to

pytestmark = pytest.mark.filterwarnings("default:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
TARGETS = ["q_proj", "down_proj"]


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")


def trained(model: peft.PeftModel) -> tuple[float, float]:
    """Train the adapters for a few steps; returns the loss before and after."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=WINDOWS, labels=WINDOWS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def packed_blocks(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    modules = model.named_modules()
    return {name.replace(".base_layer", ""): m.blocks for name, m in modules if isinstance(m, PackedLinear)}


@pytest.fixture
def pruned(tiny_llama: LlamaForCausalLM) -> PreTrainedModel:
    return permprune.prune(tiny_llama, order="random", examples=WINDOWS).model


def test_a_merge_keeps_zeros_and_the_record(pruned: PreTrainedModel, tmp_path: Path) -> None:
    before = {layer.name: layer.weight.clone() for layer in block_linears(pruned)}
    model = peft.get_peft_model(pruned, lora())
    with pytest.raises(permprune.PermpruneError, match="merge_adapters"):
        permprune.keep_pattern(model)
    first, last = trained(model)
    assert last < first
    merged = permprune.merge_adapters(model)
    for layer in block_linears(merged):
        assert not layer.weight[before[layer.name] == 0].any()
        moved = any(name in layer.name for name in TARGETS)
        assert torch.equal(layer.weight, before[layer.name]) != moved
    permprune.save(merged, tmp_path / "merged")
    assert permprune.verify(tmp_path / "merged").layers == len(before)


def test_a_dense_model_is_not_merged(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(permprune.PermpruneError, match="merge_and_unload"):
        permprune.merge_adapters(peft.get_peft_model(tiny_llama, lora()))


def test_adapters_on_packed_layers(pruned: PreTrainedModel, tmp_path: Path) -> None:
    permprune.pack(pruned, held_patterns(pruned), dtype="fp32")
    before = {name: blocks.clone() for name, blocks in packed_blocks(pruned).items()}
    model = peft.get_peft_model(pruned, permprune.lora_on_packed(lora()))
    first, last = trained(model)
    assert last < first
    assert packed_blocks(pruned).keys() == before.keys()
    assert all(torch.equal(blocks, before[name]) for name, blocks in packed_blocks(pruned).items())
    expected = model(input_ids=WINDOWS).logits
    with pytest.raises(permprune.PermpruneError, match="packed weights are frozen"):
        permprune.merge_adapters(model)
    with pytest.raises(permprune.PermpruneError, match="packed weights are frozen"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    config = permprune.lora_on_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    with model.disable_adapter():
        plain = model(input_ids=WINDOWS).logits
    assert not torch.allclose(plain, expected)
    base = model.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    torch.testing.assert_close(again(input_ids=WINDOWS).logits, expected)


def test_all_linear_would_leave_packed_layers_out() -> None:
    with pytest.raises(permprune.PermpruneError, match="name them in target_modules"):
        permprune.lora_on_packed(peft.LoraConfig(target_modules="all-linear"))


def test_adapters_on_dense_layers_in_int8(tiny_llama: LlamaForCausalLM) -> None:
    config = tiny_llama.config
    config.hidden_size = 64
    model = LlamaForCausalLM(config).eval()
    patterns = prune_to(model)
    dense = [name for name in patterns if name.endswith("q_proj")]
    permprune.pack(model, patterns | dict.fromkeys(dense, "dense"), dtype="int8")
    before = {name: model.get_submodule(name).values.clone() for name in dense}
    adapted = peft.get_peft_model(model, permprune.lora_on_packed(lora()))
    first, last = trained(adapted)
    assert last < first
    layers = {name: adapted.base_model.model.get_submodule(name) for name in dense}
    assert all(torch.equal(layer.base_layer.values, before[name]) for name, layer in layers.items())
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())
