"""Which linears are pruned."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from permprune.errors import PermpruneError
from permprune.models.layers import blocks, prunable_layers
from permprune.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def block(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.ModuleDict({"up": nn.Linear(width, 4), "down": nn.Linear(4, width)}))


class Classifier(nn.Module):
    """A stem, two blocks, a head that is itself a sequence of modules, and a list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        self.classes = nn.ModuleList([nn.Linear(8, 2) for _ in range(3)])


def names(model: nn.Module, exclude: tuple[str, ...] = ()) -> list[str]:
    return [layer.name for layer in prunable_layers(model, TWO_FOUR, exclude)]


def test_takes_every_linear_of_the_blocks_and_no_head(tiny_llama):
    inside = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    expected = [
        f"model.layers.{i}.{part}.{name}"
        for i in range(2)
        for part, parts in zip(("self_attn", "mlp"), inside, strict=True)
        for name in parts
    ]
    assert names(tiny_llama) == expected
    assert blocks(tiny_llama) == list(tiny_llama.model.layers)


def test_a_head_of_several_modules_and_a_list_of_heads_are_no_blocks():
    model = Classifier()
    assert blocks(model) == list(model.encoder["layers"])
    assert names(model) == [f"encoder.layers.{i}.1.{name}" for i in range(2) for name in ("up", "down")]


def test_leaves_out_what_the_globs_match(tiny_llama):
    kept = names(tiny_llama, ("*.self_attn.*", "model.layers.1.*"))
    assert kept == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_names_the_weight_and_shows_it_live(tiny_llama):
    parameters = dict(tiny_llama.named_parameters())
    for layer in prunable_layers(tiny_llama, TWO_FOUR):
        assert layer.weight.data_ptr() == parameters[layer.parameter].data_ptr()
        assert not layer.transposed


def test_shows_a_transposed_weight_as_outputs_by_inputs():
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    layers = {layer.name: layer for layer in prunable_layers(GPT2LMHeadModel(config), TWO_FOUR)}
    assert len(layers) == 8
    layer = layers["transformer.h.0.attn.c_attn"]
    assert layer.transposed and layer.weight.shape == (24, 8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.module(x), x @ layer.weight.T + layer.module.bias)
    layer.weight.zero_()
    assert layer.module.weight.abs().sum() == 0


def test_refuses_a_model_without_blocks():
    with pytest.raises(PermpruneError, match="no linear layer to prune"):
        names(nn.ModuleDict({"only": nn.Linear(8, 8)}))


def test_refuses_when_all_is_excluded(tiny_llama):
    with pytest.raises(PermpruneError, match="no linear layer to prune"):
        names(tiny_llama, ("*",))


def test_refuses_a_width_that_the_pattern_does_not_divide():
    with pytest.raises(PermpruneError, match=r"0\.1\.up has rows of 6 weights"):
        names(nn.ModuleDict({"layers": nn.ModuleList([block(6), block(6)])}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(tiny_llama, bad):
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(PermpruneError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinite"):
        names(tiny_llama)
