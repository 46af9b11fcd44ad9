"""Attention by the native library beside PyTorch's in float64, and which calls it gets."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from permprune.inference.pack import pack
from permprune.kernels import library
from permprune.kv.cache import PrunedCache
from permprune.models import sdpa
from permprune.models.layers import prunable_layers
from permprune.models.sdpa import attention
from permprune.pattern import Pattern

LEAST = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the last bit of numbers around one."""


def states(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that the native library gets."""
    found: list[tuple[int, ...]] = []

    def counted(attend: Callable[..., Tensor], query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(tuple(query.shape))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(sdpa, "attend", partial(counted, sdpa.attend))
    monkeypatch.setattr(sdpa, "attend_many", partial(counted, sdpa.attend_many))
    return found


def grouped(group: int) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = group
    return module


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    width=st.sampled_from([8, 24, 64, 128]),
    length=st.integers(1, 700),
    dtype=st.sampled_from(list(LEAST)),
    masked=st.booleans(),
)
def test_a_single_query_gets_what_float64_gives(
    batch: int, heads: int, group: int, width: int, length: int, dtype: torch.dtype, masked: bool
) -> None:
    query = states(batch, heads * group, 1, width, dtype=dtype)
    key, value = (states(batch, heads, length, width, dtype=dtype, seed=seed) for seed in (1, 2))
    mask = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True  # a query reads at least one token
    found, _ = attention(grouped(group), query, key, value, mask)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask, enable_gqa=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.transpose(1, 2), rtol=2 * LEAST[dtype], atol=2 * LEAST[dtype])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", ["fp32", "gradient", "float mask", "dropout", "wide", "bias"])
def test_other_calls_go_to_pytorch(case: str, count: int, calls: list[tuple[int, ...]]) -> None:
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    width = 264 if case == "wide" else 64
    query, key = states(1, 4, count, width, dtype=dtype), states(1, 2, 9, width, dtype=dtype, seed=1)
    query.requires_grad_(case == "gradient")
    mask = torch.zeros(1, 1, count, 9, dtype=dtype) if case == "float mask" else None
    dropout = 0.5 if case == "dropout" else 0.0
    bias = torch.zeros(1, 4, count, 9, dtype=dtype) if case == "bias" else None
    found, _ = attention(grouped(2), query, key, key, mask, dropout=dropout, position_bias=bias)
    assert found.shape == (1, count, 4, width) and not calls


@pytest.mark.parametrize("read", ["causal", "as the module", "all", "mask", "a static cache"])
def test_many_queries_go_to_matrix_units_and_get_what_transformers_gives(
    kernel: str, read: str, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, length = grouped(2), 20 if read == "a static cache" else 9
    query, key = states(1, 4, 9, 64, dtype=torch.bfloat16), states(1, 2, length, 64, dtype=torch.bfloat16, seed=1)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu() if read == "mask" else None
    causal = {"as the module": None, "all": False}.get(read, True)
    found, _ = attention(module, query, key, key, mask, is_causal=causal)
    expected, _ = sdpa.sdpa_attention_forward(module, query, key, key, mask, is_causal=causal)
    assert bool(calls) == (kernel == "amx")
    torch.testing.assert_close(found, expected, rtol=2 * LEAST[torch.bfloat16], atol=2 * LEAST[torch.bfloat16])
    monkeypatch.setattr(sdpa, "LONGEST", 8)
    calls.clear()
    attention(module, query, key, key, mask, is_causal=causal)
    assert not calls


@pytest.mark.parametrize("pruned", [False, True])
def test_a_packed_model_decodes_natively(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, calls: list[tuple[int, ...]], pruned: bool
) -> None:
    prunable = prunable_layers(tiny_llama, Pattern.parse("2:4"))
    for layer in prunable:
        layer.weight.unflatten(1, (-1, 4))[..., 2:] = 0
    pack(tiny_llama, {layer.name: "2:4" for layer in prunable}, dtype="bf16")
    tiny_llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = LlamaForCausalLM(model.config).bfloat16()
    other(torch.arange(6)[None])
    assert not calls  # other models of the process compute what they did
    if pruned:  # later, other caches are read as before
        PrunedCache(model)
    tokens = torch.arange(12).view(2, 6)
    written = model.generate(
        tokens, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    counts = [6] if library.available() and library.best().name == "amx" else [1, 1]  # the prompt, or what follows it
    assert [shape[2] for shape in calls] == [count for count in counts for _ in model.model.layers]
    with torch.no_grad():
        expected = model(written.sequences[:, :-1]).logits[:, 5:]
    found = torch.stack(written.logits, 1).to(expected.dtype)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
