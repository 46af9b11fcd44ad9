"""The choice of the bits of each head."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kv.attention import Plain, attend
from permprune.kv.calibration import observe_states
from permprune.kv.coding import BITS, token_bytes
from permprune.kv.tiers import measure_bits, spend


def test_bytes_are_spent_where_they_gain_most() -> None:
    errors = [[9.0, 3.0, 2.9], [4.0, 3.5, 0.0], [1.0, 0.9, 0.8]]
    sizes = [[1, 2, 3]] * 3
    for budget in range(3, 10):
        chosen = spend(errors, sizes, budget)
        fitting = [c for c in itertools.product(range(3), repeat=3) if sum(c) + 3 <= budget]
        best = min(sum(errors[unit][tier] for unit, tier in enumerate(c)) for c in fitting)
        assert sum(chosen) + 3 <= budget
        if budget != 5:  # where the best choice cannot be reached step by step
            assert sum(errors[unit][tier] for unit, tier in enumerate(chosen)) == pytest.approx(best)


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
        spent += sum(token_bytes(int(n), 8) for own in (keys, values) for n in own.bits)
    assert 0.5 < spent / (2 * 2 * 2 * 16) <= 0.6
    with pytest.raises(PermpruneError, match="--bytes is 0"):
        measured.channels(0.1)
