"""Transformers' "sdpa" attention on a CPU, by the native library where that is faster than PyTorch's kernel.

PyTorch's takes up to 15 times as long for single queries in half precision, as in decoding, except in bf16 on Intel's
processors with matrix units (AMX); there it takes up to three times as long for all other calls
(`benchmarks/attention.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from permprune.kernels import library
from permprune.kernels.attention.native import Side, attend, attend_many
from permprune.kernels.attention.states import WIDEST

HALVES = (torch.bfloat16, torch.float16)

LONGEST = 8192
"""Tokens up to which matrix units are faster: the scores of 32 queries for so many take the level 2 cache."""

OTHERS = ("position_bias", "softcap", "output_attentions")
"""Options that are left to Transformers, which adds a bias and tells what it does not do."""


NATIVE = "attends_natively"
"""The attribute of the modules of a model whose attention is native."""


def use_native_attention(model: nn.Module) -> None:
    """Let the "sdpa" attention of a model use the native library; other models compute what they did before."""
    for module in model.modules():
        setattr(module, NATIVE, True)
    AttentionInterface.register("sdpa", _attention_of_any)


def restore_attention(model: nn.Module) -> None:
    """Undo `use_native_attention`."""
    for module in model.modules():
        vars(module).pop(NATIVE, None)


def _attention_of_any(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    compute = attention if getattr(module, NATIVE, False) else sdpa_attention_forward
    result: tuple[Tensor, None] = compute(module, *args, **kwargs)
    return result


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa_attention_forward`, which computes what the native library does not."""
    if dropout or not _is_native(query, key, value, attention_mask, options):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return result
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and attention_mask is None
        return attend_many(query, key, value, scaling=scaling, mask=attention_mask, causal=causal), None
    return attend(
        query, Side(None, key), Side(None, value), packed=0, before=key.shape[2], scaling=scaling, mask=attention_mask
    ), None


def _is_native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether the native library computes this, without gradients, faster than PyTorch."""
    states, count = (query, key, value), query.shape[2]
    if library.is_traced() or query.shape[0] != key.shape[0]:
        return False
    fits = all(type(t) is Tensor and t.is_cpu and t.dtype == query.dtype and t.shape[-1] <= WIDEST for t in states)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in states)
    plain = all(options.get(name) is None or options[name] is False for name in OTHERS)
    fits &= plain and (mask is None or mask.dtype == torch.bool) and query.dtype in HALVES
    if not fits or graph or not library.available():
        return False
    if query.dtype == torch.bfloat16 and library.best().name == "amx":
        return count > 1 and _fits_tiles(query, key, value)
    return count == 1


def _fits_tiles(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether matrix units read these states, of so many tokens that they are faster."""
    fits = value.shape == key.shape and query.shape[3] == key.shape[3] and query.shape[1] % key.shape[1] == 0
    return fits and 0 < key.shape[2] <= LONGEST
