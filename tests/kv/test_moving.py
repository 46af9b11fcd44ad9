"""Means of keys that move with the position."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from permprune.examples import Examples
from permprune.kv.cache import PrunedCache
from permprune.kv.calibration import observe_states
from permprune.kv.config import KVConfig
from permprune.kv.moving import BLOCK, Moving, rotaries_of, still_mean
from permprune.kv.tiers import choose_means, measure_bits, outputs_of
from permprune.models.forward import cache_argument

from .reference import coded_channels


def random_moving(heads: int, width: int) -> Moving:
    mean = coded_channels([4] * heads, width, moving=True).moving
    assert mean is not None
    return mean


def test_scores_are_the_products_with_the_means() -> None:
    moving, query = random_moving(2, 8), torch.randn(3, 2, 5, 8)
    first, count = torch.tensor([0, 7, -3]), 2 * BLOCK + 9
    expected = query @ moving.at(first[:, None] + torch.arange(count)).transpose(-1, -2)
    torch.testing.assert_close(moving.scores(query, first, count), expected, rtol=1e-3, atol=1e-3)
    some = moving.changed(lambda part: part[1:]).scores(query[:, 1:], first, count)
    torch.testing.assert_close(some, expected[:, 1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rotated", [8, 4])
def test_the_mean_before_rotary_embeddings_is_found(rotated: int) -> None:
    model, bias = nn.Module(), torch.randn(2, 1, 8) * 10
    model.register_buffer("inv_freq", 1 / 10 ** (torch.arange(rotated // 2) / 2))
    halves, pairs = rotaries_of(model, 8)
    assert not rotaries_of(model, 2)
    angle = torch.arange(500)[:, None] * model.inv_freq.repeat(2)
    for rotary, turned in ((halves, True), (pairs, False)):
        keys = (bias + torch.randn(2, 500, 8) * 0.1).clone()
        own = keys[..., :rotated] if turned else torch.cat((keys[..., :rotated:2], keys[..., 1:rotated:2]), -1)
        own = apply_rotary_pos_emb(own[None], own[None], angle.cos()[None], angle.sin()[None])[0][0]
        keys[..., :rotated] = own if turned else torch.stack(own.chunk(2, -1), -1).flatten(-2)
        moving = rotary.mean_of(keys, torch.arange(500))
        assert (keys - moving.at(torch.arange(500)[None])[0]).square().mean() < 0.02
        assert (keys - still_mean(keys).mean[:, None]).square().mean() > 1


@pytest.fixture
def biased() -> Qwen2ForCausalLM:
    """A model whose keys have large biases."""
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=100.0, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 10
            layer.self_attn.k_proj.weight *= 10
            layer.self_attn.k_proj.bias.normal_(std=30)
    return model


@torch.no_grad()
def test_large_biases_of_keys_cost_nothing(biased: Qwen2ForCausalLM) -> None:
    tokens = torch.randint(128, (4, 120))
    observed = observe_states(biased, Examples.of(tokens), skipped=4)
    measured = measure_bits(observed)
    assert all(moving is not None and moving.frequency.any(1).all() for moving in measured.means.values())
    channels, found = measured.channels(0.42), []
    for means in (measured.means, {i: still_mean(layer.states()[0]) for i, layer in observed.items()}):
        own = {i: (observed[i].coded("keys", keys.bits, means[i]), values) for i, (keys, values) in channels.items()}
        cache = PrunedCache(biased, KVConfig("mixed", "mixed", window=8), own, exact_window=True)
        found.append(biased(tokens[:1], **cache_argument(biased, cache)).logits)
    expected = biased(tokens[:1]).logits
    errors = [float((logits - expected).square().mean()) for logits in found]
    assert errors[0] < 0.1 * errors[1]


def test_soft_capped_scores_keep_the_means(tiny_llama: LlamaForCausalLM) -> None:
    observed = observe_states(tiny_llama, Examples.of(torch.randint(128, (2, 40))))
    observed[0].centres_keys = False
    assert choose_means(observed[0], outputs_of(observed[0])) is None
