"""Layers whose heads have different numbers of bits."""

import random
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention import gpu
from permprune.kv.attention import Call
from permprune.kv.bands import MixedLayer
from permprune.kv.cache import PrunedCache
from permprune.kv.config import KVConfig
from permprune.kv.packing import PackedTokens
from permprune.kv.view import View
from permprune.models.forward import cache_argument

from .reference import attend_stored, coded_channels, random_channels

MIXED = KVConfig("mixed", "mixed", window=8, sinks=2)


@pytest.fixture(params=[*library.names(), "torch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes attention to packed tokens in turn; Triton on a GPU where there is one, or in its interpreter."""
    library.chosen.cache_clear()
    monkeypatch.setenv(library.FORCED, "torch" if request.param == "triton" else request.param)
    if request.param == "triton":
        monkeypatch.setattr(gpu, "PART", 32)
        monkeypatch.setattr(gpu, "TOKENS", 16)
        monkeypatch.setattr(View, "_runs_triton", lambda view, call: view.before and view._is_decoding(call))
        monkeypatch.setattr(PackedTokens, "read", None)  # all packed tokens are read by the kernel
    yield request.param
    library.chosen.cache_clear()


@pytest.mark.parametrize("seed", range(4))
def test_each_head_reads_what_it_holds_in_few_bits(kernels: str, seed: int) -> None:
    chosen = random.Random(seed)
    batch, heads, group = chosen.randint(1, 2), chosen.randint(1, 3), chosen.randint(1, 3)
    widths = chosen.choice([8, 20, 64]), chosen.choice([16, 24, 72])
    bits = [[chosen.randint(2, 6) for _ in range(heads)] for _ in widths]
    channels = coded_channels(bits[0], widths[0], moving=seed % 2 == 0), coded_channels(bits[1], widths[1])
    layer = MixedLayer(MIXED.replace(window=chosen.randint(1, 9), sinks=chosen.randint(0, 5)), *channels)
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    module, padding = Mock(is_causal=True, num_key_value_groups=group), torch.tensor([[0], [7]])[:batch]
    dtype, close = (torch.bfloat16, 3e-2) if seed == 3 else (torch.float32, 1e-4)
    last = 0
    for count in (chosen.randint(30, 60), 1, chosen.randint(8, 16), 1):
        first, last = last, last + count
        states = [
            torch.randn(batch, own, count, width, device=device).to(dtype)
            for own, width in ((heads * group, widths[0]), (heads, widths[0]), (heads, widths[1]))
        ]
        mask = (torch.arange(last) <= torch.arange(first, last)[:, None]) & (torch.arange(last) >= padding[..., None])
        call = Call(states[0], mask[:, None].to(device), 0.5)
        expected = attend_stored(layer, call, states[1], states[2]) if first else None
        found = layer.update(states[1], states[2])[0].attend(call, module)
        if first:
            torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    assert layer.get_seq_length() == last


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
