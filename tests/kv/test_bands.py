"""Layers whose heads have different numbers of bits."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.kv.attention import Call
from permprune.kv.bands import MixedLayer
from permprune.kv.cache import PrunedCache
from permprune.kv.config import KVConfig
from permprune.kv.layer import PrunedLayer
from permprune.models.forward import cache_argument

from .reference import coded_channels, random_channels

MIXED = KVConfig("mixed", "mixed", window=8, sinks=2)


@pytest.mark.parametrize("masked", [False, True])
def test_each_head_reads_what_a_cache_of_its_pattern_holds(*, masked: bool) -> None:
    keys, values = coded_channels([3, 6, 3], 8, moving=True), coded_channels([5, 2, 5], 8)
    mixed = MixedLayer(MIXED, keys, values)
    plain = [
        PrunedLayer(MIXED.replace(keys=f"{keys.bits[h]}bit", values=f"{values.bits[h]}bit"), keys, values)
        for h in range(3)
    ]
    assert [len(heads) for heads in mixed.heads] == [2, 1]
    states, module = torch.randn(2, 2, 3, 43, 8), Mock(is_causal=True, num_key_value_groups=2)
    for first, last in ((0, 40), (40, 41), (41, 43)):
        mask = torch.rand(2, 1, last - first, last) < 0.8 if masked else None
        call = Call(torch.randn(2, 6, last - first, 8), mask, 0.5)

        def read(
            layer: MixedLayer | PrunedLayer, call: Call = call, part: Tensor = states[:, :, :, first:last]
        ) -> Tensor:
            return layer.update(part[0], part[1])[0].attend(call, module)

        found, expected = read(mixed), [read(layer) for layer in plain]
        for head in range(3):
            own = slice(2 * head, 2 * head + 2)
            torch.testing.assert_close(found[:, :, own], expected[head][:, :, own], rtol=1e-4, atol=1e-5)
    assert mixed.get_seq_length() == 43 and mixed.dense_nbytes == plain[0].dense_nbytes


def test_models_generate_with_it(tiny_llama: LlamaForCausalLM) -> None:
    channels = {i: (coded_channels([2, 6], 8, moving=True), coded_channels([3, 4], 8)) for i in range(2)}
    tokens = torch.randint(5, 128, (2, 40))
    cache = PrunedCache(tiny_llama, MIXED, channels)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    first = tiny_llama.generate(tokens, **cache_argument(tiny_llama, cache), **options)
    assert 0 < cache.nbytes < cache.dense_nbytes
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(tiny_llama.generate(tokens, **cache_argument(tiny_llama, cache), **options), first)
    cache.crop(-5)
    assert cache.get_seq_length() == first.shape[1] - 6
    cache.reset()
    beams = tiny_llama.generate(tokens, **cache_argument(tiny_llama, cache), **options, num_beams=2)
    assert beams.shape[0] == 2 and cache.get_seq_length() == beams.shape[1] - 1


def test_channels_that_do_not_fit_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    plain = {i: (random_channels(2, 8), random_channels(2, 8)) for i in range(2)}
    with pytest.raises(PermpruneError, match="no bits for each head"):
        PrunedCache(tiny_llama, MIXED, plain)
    with pytest.raises(PermpruneError, match="permprune kv --bytes"):
        PrunedCache(tiny_llama, MIXED)
    narrow = MixedLayer(MIXED, coded_channels([2], 8), coded_channels([2], 8))
    with pytest.raises(PermpruneError, match="for keys of 1 heads of 8 channels"):
        narrow.update(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
