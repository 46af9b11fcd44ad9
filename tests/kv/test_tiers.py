"""The choice of how many channels each head keeps."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.kv.attention import Plain, attend
from permprune.kv.calibration import observe_states
from permprune.kv.config import KVConfig
from permprune.kv.tiers import choose_tiers, spend, tiers_of

CONFIG = KVConfig("mixed", "mixed", dtype="bf16")


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


@pytest.mark.parametrize(("width", "dtype"), [(8, "int5"), (64, "int5"), (64, "int8"), (128, "int5"), (80, "bf16")])
def test_more_channels_take_more_bytes(width: int, dtype: str) -> None:
    tiers = tiers_of(width, CONFIG.replace(dtype=dtype))
    assert list(tiers) == sorted(tiers) and list(tiers)[-1] == width
    sizes = list(tiers.values())
    assert all(before < after for before, after in itertools.pairwise(sizes))


def test_heads_that_matter_keep_more(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for layer in tiny_llama.model.layers:  # the values of the second head are hardly read
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.self_attn.v_proj.weight[8:] *= 1e-3
    observed = observe_states(tiny_llama, Examples.of(torch.randint(128, (4, 80))), skipped=4)
    probe = observed[0].probes[0]
    assert probe.call.query.shape == (1, 4, 32, 8)
    assert attend(probe.call, Plain(probe.keys, probe.values)).isfinite().all()
    channels = choose_tiers(observed, CONFIG, 0.6)
    tiers = tiers_of(8, CONFIG)
    spent = 0
    for keys, values in channels.values():
        assert keys.kept is not None and values.kept is not None
        assert values.kept[0] > values.kept[1] == min(tiers)
        spent += sum(tiers[int(n)] for own in (keys, values) for n in own.kept)
    assert 0.5 < spent / (2 * 2 * 2 * 16) <= 0.6
    with pytest.raises(PermpruneError, match="--bytes is 0"):
        choose_tiers(observed, CONFIG, 0.1)
