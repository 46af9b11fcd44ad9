"""The order of values, folded into the weights."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from permprune.coupling.space import Coupling
from permprune.errors import PermpruneError
from permprune.kv import folding
from permprune.kv.cache import PrunedCache
from permprune.kv.folding import fold_values
from permprune.models.forward import cache_argument

from .reference import PLAIN, random_channels

TOKENS = torch.randint(5, 128, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel, cache: PrunedCache) -> torch.Tensor:
    """The logits of all tokens but the first 30, which are read packed."""
    model(input_ids=TOKENS[:, :30], **cache_argument(model, cache))
    found: torch.Tensor = model(input_ids=TOKENS[:, 30:], **cache_argument(model, cache)).logits
    return found


def test_a_folded_model_reads_the_same(tiny_llama: LlamaForCausalLM) -> None:
    channels = {i: (random_channels(2, 8), random_channels(2, 8)) for i in range(2)}
    config, folded = PLAIN.replace(window=8), copy.deepcopy(tiny_llama)
    own = fold_values(folded, channels, {"input_ids": TOKENS[:, :4]})
    assert all(values.is_natural and not channels[i][1].is_natural for i, (_, values) in own.items())
    expected = logits(tiny_llama, PrunedCache(tiny_llama, config, channels))
    found = logits(folded, PrunedCache(folded, config, own))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = logits(tiny_llama, PrunedCache(tiny_llama, config, own))  # groups of the model's order
    assert not torch.allclose(other, expected, rtol=1e-4, atol=1e-5)


def test_values_that_no_weights_show_are_refused(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "discover", lambda *_: Coupling((), ()))
    with pytest.raises(PermpruneError, match="the order of the values of layer 0 cannot be folded"):
        fold_values(tiny_llama, {0: (random_channels(2, 8), random_channels(2, 8))}, {"input_ids": TOKENS})
