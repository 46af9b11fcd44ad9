"""Attention of single queries in half precision on a CPU, as in decoding, by the native library.

PyTorch's kernel, which is made for many queries, takes up to 15 times as long (`benchmarks/attention.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from permprune.kernels import library
from permprune.kernels.attention.native import Side, attend
from permprune.kernels.attention.states import WIDEST

HALVES = (torch.bfloat16, torch.float16)

OTHERS = ("position_bias", "softcap", "output_attentions")
"""Options that are left to Transformers, which adds a bias and tells what it does not do."""


def use_native_attention() -> None:
    """Let Transformers' "sdpa" attention, for all models of this process, compute single queries natively."""
    AttentionInterface.register("sdpa", attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa_attention_forward`, which computes what the native library does not."""
    if dropout or not _is_native(query, key, value, attention_mask, options):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = (Side(None, states, _natural(*states.shape[1::2])) for states in (key, value))
    return attend(query, keys, values, packed=0, before=key.shape[2], scaling=scaling, mask=attention_mask), None


def _is_native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Return whether the native library computes this: one query a sequence, without gradients."""
    states = (query, key, value)
    if library.is_traced() or query.shape[2] != 1 or query.shape[0] != key.shape[0]:
        return False
    fits = all(t.is_cpu and t.dtype == query.dtype and t.shape[-1] <= WIDEST for t in states)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in states)
    plain = all(options.get(name) is None or options[name] is False for name in OTHERS)
    return (
        fits
        and query.dtype in HALVES
        and not graph
        and plain
        and (mask is None or mask.dtype == torch.bool)
        and library.available()
    )


@lru_cache
def _natural(heads: int, width: int) -> Tensor:
    """The order of channels that `Side` expects, int64 (heads, width)."""
    return torch.arange(width, device="cpu").repeat(heads, 1)
