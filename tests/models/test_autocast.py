"""Attention in blocks against torch's in float64."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DebertaConfig, DebertaModel, LlamaForCausalLM

from permprune.models import autocast as module
from permprune.models.activation_checkpointing import recomputed
from permprune.models.autocast import BlockwiseAttention, autocast

CPU = torch.device("cpu")


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    widths=st.sampled_from([(8, 8), (16, 5)]),
    masked=st.sampled_from(["", "causal", "padding", "added padding", "each query"]),
    at_once=st.sampled_from([1, 5000, 1 << 20]),
)
def test_blocks_give_the_result_and_gradients_of_float64(
    batch: int,
    heads: int,
    shared: int,
    lengths: tuple[int, int],
    widths: tuple[int, int],
    masked: str,
    at_once: int,
) -> None:
    is_causal = masked == "causal"
    queries, keys = lengths[:1] * 2 if is_causal else lengths
    inputs = tensors(
        (batch, heads * shared, queries, widths[0]), (batch, heads, keys, widths[0]), (batch, heads, keys, widths[1])
    )
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask, seen = None, torch.rand(batch, 1, queries if masked == "each query" else 1, keys) < 0.5
    if masked and not is_causal:
        seen[..., 0] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, -3e38) if masked == "added padding" else seen
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "scale": 0.3}
    with pytest.MonkeyPatch.context() as patch, BlockwiseAttention():
        patch.setattr(module, "SCORES", at_once)
        result = F.scaled_dot_product_attention(*inputs, attn_mask=mask, **options)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen if mask is not None else None, **options)
    assert result.dtype == torch.bfloat16 and "Attention" in type(result.grad_fn.next_functions[0][0]).__name__
    arriving = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(result, inputs, arriving)
    wanted = torch.autograd.grad(expected, exact, arriving.double())
    for own, other in zip((result, *found), (expected, *wanted), strict=True):
        assert (own - other).norm() <= 0.02 * other.norm() + 1e-2


def test_autocast_rounds_after_scaling_as_its_inputs_have_more_digits() -> None:
    query, key, value = tensors((2, 3, 70, 16), (2, 3, 70, 16), (2, 3, 70, 16), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with autocast(CPU, torch.bfloat16):
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert result.dtype == torchs.dtype == torch.bfloat16
    assert (result - torchs).abs().max() < 0.03


@pytest.mark.parametrize("case", ["fp32", "mask", "no gradient", "nothing seen", "cached keys", "three dimensions"])
def test_other_calls_go_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not a call for blocks")

    monkeypatch.setattr(module, "_Attention", refuse)
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    query, key, value = tensors((1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 6, 8), dtype=dtype)
    if case == "three dimensions":
        query, key, value = query[0], key[0], value[0]
    masks = {"mask": (4, 6), "no gradient": (1, 1, 4, 6), "nothing seen": (1, 1, 4, 6)}
    mask = torch.ones(masks[case], dtype=torch.bool) if case in masks else None
    if case == "no gradient":
        query = query.detach()
    if mask is not None and case == "nothing seen":
        mask[..., 1, :] = False
    is_causal = case == "cached keys"
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    with BlockwiseAttention():
        found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_dropout_goes_to_torch() -> None:
    query, key, value = tensors((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    with BlockwiseAttention():
        assert not F.scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()


@pytest.mark.parametrize("active", [False, True])
def test_recomputed_blocks_run_the_attention_of_their_first_run(tiny_llama: LlamaForCausalLM, active: bool) -> None:
    with recomputed(tiny_llama):
        with torch.autocast("cpu", torch.bfloat16), BlockwiseAttention() if active else nullcontext():
            loss = tiny_llama(torch.arange(8)[None]).logits.float().logsumexp(-1).sum()
        loss.backward()  # torch compares the numbers of tensors that both runs save
    assert tiny_llama.model.layers[0].self_attn.q_proj.weight.grad is not None


@torch.no_grad()
def test_a_mask_that_fills_with_the_least_number_of_fp32_runs() -> None:
    torch.manual_seed(0)
    relative: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = DebertaModel(DebertaConfig(**sizes, **relative)).eval()
    tokens = torch.arange(14).view(2, 7)
    padded = (tokens < 10).long()
    exact = model(tokens, attention_mask=padded).last_hidden_state
    with autocast(CPU, torch.bfloat16):
        rounded = model(tokens, attention_mask=padded).last_hidden_state
        assert (
            torch.zeros(2, dtype=torch.bfloat16).masked_fill(torch.tensor([True, False]), -torch.inf)[0] == -torch.inf
        )
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
