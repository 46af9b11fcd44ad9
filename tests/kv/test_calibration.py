"""What a cache is calibrated on."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kv.calibration import fit_channels, observe_states
from permprune.kv.packing import Channels, StatesLayout, decode, encode
from permprune.models.forward import cache_argument
from permprune.pattern import Pattern

from ..conversations import padded_answers

TOKENS = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0))


def test_states_are_those_of_the_model(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        plain = DynamicCache(config=tiny_llama.config)
        tiny_llama(TOKENS, **cache_argument(tiny_llama, plain))
    observed = observe_states(tiny_llama, Examples.of(TOKENS), skipped=4, batch=2)
    assert observed.keys() == {0, 1}
    for number, layer in observed.items():
        keys, values = layer.states()
        for found, states in ((keys, plain.layers[number].keys), (values, plain.layers[number].values)):
            torch.testing.assert_close(found, states[:, :, 4:].transpose(0, 1).flatten(1, 2))
        weights = layer.query_weights()
        assert weights.shape == (2, 8) and float(weights.max()) == 1


def test_padding_is_not_observed(tiny_llama: LlamaForCausalLM) -> None:
    examples, texts = padded_answers()
    observed = observe_states(tiny_llama, examples, batch=2)
    apart = [observe_states(tiny_llama, Examples.of(text[None])) for text, *_ in texts]
    for number, layer in observed.items():
        for found, *parts in zip(layer.states(), *(one[number].states() for one in apart), strict=True):
            torch.testing.assert_close(found, torch.cat(parts, 1))
        assert layer.squares is not None
        torch.testing.assert_close(layer.squares, sum(one[number].squares for one in apart))


def test_many_tokens_are_sampled(tiny_llama: LlamaForCausalLM) -> None:
    observed = observe_states(tiny_llama, Examples.of(torch.randint(128, (30, 100))), skipped=0)
    assert observed[0].states()[0].shape == (2, 1500, 8)


def test_levels_lower_the_error_of_recovery() -> None:
    spread = torch.tensor([1.0, 0.2, 3.0, 0.5] * 2)
    states, weight = torch.randn(2, 500, 8) * spread, torch.rand(2, 8) + 0.5
    pattern, order = Pattern(2, 4), torch.stack([torch.randperm(8) for _ in range(2)])

    def error(channels: Channels) -> float:
        layout = StatesLayout(pattern, torch.float32, signs=True)
        arranged = channels.arrange(states[None])
        found = decode(encode(arranged, channels, layout), channels, layout, torch.float32)
        return float(((found - arranged) * channels.weight[:, None]).square().sum())

    fitted = fit_channels(states, weight, order, pattern)
    fitted.check("kv")
    assert torch.equal(fitted.order, order) and torch.equal(fitted.weight, weight.gather(1, order))
    assert error(fitted) < 0.95 * error(Channels(order, fitted.weight, 1 / fitted.weight))


def test_a_model_with_attention_of_its_own_is_refused(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(*args: Any, **options: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **options)
        return 2 * output, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "doubled", doubled)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "doubled", sdpa_mask)
    tiny_llama.set_attn_implementation("doubled")
    with pytest.raises(PermpruneError, match="LlamaForCausalLM computes attention in a way of its own"):
        observe_states(tiny_llama, Examples.of(TOKENS))
    assert tiny_llama.config._attn_implementation == "doubled"


def test_a_model_that_caches_latents_is_refused() -> None:
    config = DeepseekV2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    with pytest.raises(PermpruneError, match="the model reads the cache by itself"):
        observe_states(DeepseekV2ForCausalLM(config).eval(), Examples.of(TOKENS))
