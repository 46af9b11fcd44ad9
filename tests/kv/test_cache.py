"""The pruned cache in models: forward passes, generation, bytes."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache

import permprune
from permprune.errors import PermpruneError
from permprune.inference.pack import pack
from permprune.kv.cache import PrunedCache
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import Channels
from permprune.models.forward import cache_argument
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern

from .reference import PLAIN, ReferenceLayer, random_channels

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = PLAIN.replace(window=8, sinks=2)
TOKENS = torch.randint(5, 128, (2, 40), generator=torch.Generator().manual_seed(0))

LayerChannels = dict[int, tuple[Channels, Channels]]


@pytest.fixture
def channels() -> LayerChannels:
    return {i: (random_channels(2, 8), random_channels(2, 8)) for i in range(2)}


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, cache: Cache | None = None, **options: Any) -> Tensor:
    given = {} if cache is None else cache_argument(model, cache)
    found: Tensor = model(tokens, **given, **options).logits
    return found


def generate(model: PreTrainedModel, cache: Cache, **options: Any) -> Any:
    given = cache_argument(model, cache)
    return model.generate(TOKENS, **given, max_new_tokens=20, pad_token_id=0, do_sample=False, **options)


@pytest.mark.parametrize(("dtype", "options"), [("auto", {}), ("auto", {"num_beams": 3})])
def test_generation_equals_that_with_a_whole_cache_pruned_alike(
    tiny_llama: LlamaForCausalLM, channels: LayerChannels, dtype: str, options: dict[str, int]
) -> None:
    config = SMALL.replace(dtype=dtype)
    cache = PrunedCache(tiny_llama, config, channels)
    reference = Cache(layers=[ReferenceLayer(config, channels[i]) for i in range(2)])
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (generate(tiny_llama, own, **options) for own in (cache, reference))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert cache.get_seq_length() == 59
    dense = generate(tiny_llama, DynamicCache(config=tiny_llama.config), **options)
    assert not torch.allclose(found.logits[-1], dense.logits[-1], **CLOSE)  # it did prune


def test_dense_patterns_change_nothing(tiny_llama: LlamaForCausalLM, channels: LayerChannels) -> None:
    expected = logits(tiny_llama, TOKENS)
    for exact in (False, True):
        cache = PrunedCache(
            tiny_llama, KVConfig("dense", "dense", dtype="auto", window=3), channels, exact_window=exact
        )
        found = [logits(tiny_llama, part, cache) for part in TOKENS.split(13, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
    torch.testing.assert_close(logits(tiny_llama, TOKENS), expected, **CLOSE)  # without a cache, too


def test_left_padding_is_read_by_no_token(tiny_llama: LlamaForCausalLM) -> None:
    config, mask = KVConfig("dense", "dense", dtype="auto", window=3), torch.ones_like(TOKENS)
    mask[1, :7] = 0
    cache = PrunedCache(tiny_llama, config)
    generated = generate(tiny_llama, cache, attention_mask=mask)
    alone = PrunedCache(tiny_llama, config)
    expected = tiny_llama.generate(
        TOKENS[1:, 7:], **cache_argument(tiny_llama, alone), max_new_tokens=20, pad_token_id=0, do_sample=False
    )
    assert torch.equal(generated[1, 7:], expected[0])


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_batch_with_left_padding_generates_what_its_rows_do_alone(
    tiny_llama: LlamaForCausalLM, channels: LayerChannels, sinks: int
) -> None:
    tiny_llama.generation_config.eos_token_id = None
    config, tokens = KVConfig("1:4", "1:4", window=4, sinks=sinks), TOKENS[:1].repeat(3, 1)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 8, 24)):
        mask[row, :padding] = 0
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 20, "pad_token_id": 0}

    def found(tokens: Tensor, mask: Tensor) -> Tensor:
        given = cache_argument(tiny_llama, PrunedCache(tiny_llama, config, channels))
        output = tiny_llama.generate(tokens, attention_mask=mask, **given, **options, do_sample=False)
        return torch.stack(output.logits, 1)

    batch = found(tokens, mask)
    for row in range(3):
        own = mask[row].bool()
        torch.testing.assert_close(batch[row], found(tokens[row : row + 1, own], mask[row : row + 1, own])[0], **CLOSE)


def test_assisted_decoding_drafts_and_rejects(tiny_llama: LlamaForCausalLM, channels: LayerChannels) -> None:
    tiny_llama.generation_config.eos_token_id = None
    assistant = LlamaForCausalLM(tiny_llama.config).eval()
    tokens, options = TOKENS[:1], {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    for config in (KVConfig("dense", "dense", dtype="auto", window=3), SMALL):
        plain, cache = PrunedCache(tiny_llama, config, channels), PrunedCache(tiny_llama, config, channels)
        expected = tiny_llama.generate(tokens, **cache_argument(tiny_llama, plain), **options)
        given = cache_argument(tiny_llama, cache)
        found = tiny_llama.generate(tokens, **given, assistant_model=assistant, **options)
        assert found.shape == expected.shape
        if config.keys == "dense":
            assert torch.equal(found, expected)


def test_a_reset_cache_is_as_new(tiny_llama: LlamaForCausalLM, channels: LayerChannels) -> None:
    cache = PrunedCache(tiny_llama, SMALL, channels)
    expected = generate(tiny_llama, cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.dense_nbytes == 0
    assert torch.equal(generate(tiny_llama, cache), expected)


def test_bytes_are_those_of_the_storages(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.bfloat16()
    tokens = TOKENS.repeat(1, 3)
    dense = DynamicCache(config=model.config)
    logits(model, tokens, dense)
    expected = sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values))
    for dtype, row in (("auto", 4 * 2 + 1 + 1 + 2), ("int8", 4 + 1 + 1 + 1 + 2)):
        cache = PrunedCache(model, SMALL.replace(dtype=dtype))
        logits(model, tokens, cache)
        assert cache.dense_nbytes == expected
        packed = cache.layers[0].packed_count(120)
        # layers, keys and values, rows, heads
        assert cache.nbytes == 2 * 2 * 2 * 2 * (packed * row + (120 - packed) * 16)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("permprune")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_layers_with_a_sliding_window_keep_their_own_cache(heard: pytest.LogCaptureFixture) -> None:
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    expected = logits(model, TOKENS)
    cache = PrunedCache(model, KVConfig("dense", "dense", dtype="auto", window=3))
    assert [type(layer) is PackedCacheLayer for layer in cache.layers] == [False, True, False]
    assert "layers 0, 2 have no full attention" in heard.text
    found = torch.cat([logits(model, part, cache) for part in TOKENS.split(11, 1)], 1)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(logits(model, TOKENS), expected, **CLOSE)  # without a cache, too
    pruned = PrunedCache(model, SMALL)
    logits(model, TOKENS, pruned)
    assert pruned.nbytes < pruned.dense_nbytes


def test_packed_weights_run_with_a_pruned_cache(tiny_llama: LlamaForCausalLM) -> None:
    layers = prunable_layers(tiny_llama, Pattern(2, 4))
    for layer in layers:
        layer.weight.mul_(Pattern(2, 4).mask(layer.weight.abs()))
    expected = generate(tiny_llama, PrunedCache(tiny_llama, SMALL))
    pack(tiny_llama, {layer.name: "2:4" for layer in layers}, dtype="fp32")
    assert torch.equal(generate(tiny_llama, PrunedCache(tiny_llama, SMALL)), expected)


def test_other_models_are_refused(tiny_llama: LlamaForCausalLM, channels: LayerChannels) -> None:
    small = {"vocab_size": 32, "hidden_size": 16}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(PermpruneError, match="BertForMaskedLM is no decoder-only language model"):
        PrunedCache(bert)
    with pytest.raises(PermpruneError, match="BloomForCausalLM does not use Transformers' attention interface"):
        PrunedCache(BloomForCausalLM(BloomConfig(**small, n_layer=1, n_head=2)))
    with pytest.raises(PermpruneError, match="the cache is for 1 layers with full attention, and the model has 2"):
        PrunedCache(tiny_llama, None, {0: channels[0]})
    cache = PrunedCache(tiny_llama, SMALL)
    tiny_llama.set_attn_implementation("sdpa")
    with pytest.raises(PermpruneError, match="or before set_attn_implementation: make a new one"):
        logits(tiny_llama, TOKENS, cache)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": "4:4"}, "keeps no or all weights"),
        ({"values": "half"}, "is not an N:M pattern"),
        ({"recovery": "wish"}, "recovery is 'wish': choose one of"),
        ({"dtype": "int3"}, "dtype is 'int3': did you mean"),
        ({"window": -1}, "window is -1"),
        ({"size": 3}, 'a cache has no setting "size"'),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PermpruneError, match=said):
        permprune.KVConfig().replace(**changes)
