"""Theoretical sizes, against counts by hand."""

import pytest
from transformers import LlamaForCausalLM

from permprune.evaluation.size import index_bits, model_bytes
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern


@pytest.mark.parametrize(
    ("pattern", "bits"), [("1:4", 2), ("2:4", 4), ("3:4", 2), ("4:8", 7), ("2:8", 5), ("8:16", 14), ("1:2", 1)]
)
def test_index_bits(pattern: str, bits: int) -> None:
    assert index_bits(Pattern.parse(pattern)) == bits


def test_a_model_is_as_large_as_its_weights(tiny_llama: LlamaForCausalLM) -> None:
    layers = prunable_layers(tiny_llama, Pattern(2, 4))
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())  # tied embeddings count once
    pruned = sum(layer.weight.numel() for layer in layers)
    assert model_bytes(tiny_llama, layers, {}) == 2 * total
    halved = model_bytes(tiny_llama, layers, {layer.name: Pattern(2, 4) for layer in layers})
    assert halved == 2 * (total - pruned) + pruned * (2 * 16 + 4) / 4 / 8
    mixed = model_bytes(tiny_llama, layers, {layers[0].name: Pattern(1, 4)})
    assert mixed == 2 * total - layers[0].weight.numel() * (64 - 18) / 4 / 8
