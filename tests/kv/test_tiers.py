"""The choice of the bits of each head."""

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kernels.attention.states import token_bytes
from permprune.kv.attention import Plain, attend
from permprune.kv.calibration import observe_states
from permprune.kv.coding import BITS, TYPES
from permprune.kv.tiers import measure_bits


def test_heads_that_matter_get_more(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for layer in tiny_llama.model.layers:  # the values of the second head are hardly read
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.self_attn.v_proj.weight[8:] *= 1e-3
    observed = observe_states(tiny_llama, Examples.of(torch.randint(128, (4, 80))), skipped=4)
    probe = observed[0].probes[0]
    assert probe.call.query.shape == (1, 4, 32, 8)
    assert attend(probe.call, Plain(probe.keys, probe.values)).isfinite().all()
    measured, spent = measure_bits(observed), 0
    for keys, values in measured.channels(0.6).values():
        assert keys.bits is not None and values.bits is not None
        assert values.bits[0] > values.bits[1] == min(BITS)
        spent += sum(token_bytes(TYPES[int(n)], 8) for own in (keys, values) for n in own.bits)
    assert 0.5 < spent / (2 * 2 * 2 * 16) <= 0.6
    with pytest.raises(PermpruneError, match="--bytes is 0"):
        measured.channels(0.1)


@pytest.mark.parametrize("length", [6, 20])
def test_bits_of_short_texts_are_chosen_by_their_errors(tiny_llama: LlamaForCausalLM, length: int) -> None:
    observed = observe_states(tiny_llama, Examples.of(torch.randint(128, (4, length))), skipped=4)
    assert all(error > 0 for head in measure_bits(observed).errors for error in head)
    with pytest.raises(PermpruneError, match=f"up to {length} tokens are too short for {length - 1} sinks"):
        observe_states(tiny_llama, Examples.of(torch.randint(128, (4, length))), skipped=length - 1)
