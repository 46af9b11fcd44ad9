"""The Triton kernel of the pruned cache, against PyTorch: in Triton's interpreter, or on a GPU where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permprune.kernels import library
from permprune.kernels.attention import gpu
from permprune.kv.attention import attention
from permprune.kv.config import KVConfig
from permprune.kv.layer import PackedCacheLayer
from permprune.kv.packing import PackedTokens
from permprune.kv.view import View

from .reference import random_channels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    library.chosen.cache_clear()
    monkeypatch.setenv(library.FORCED, "torch")
    yield
    library.chosen.cache_clear()


def output(config: KVConfig, states: list[Tensor], mask: Tensor | None, **options: Any) -> Tensor:
    """What two new tokens read after 70 others."""
    torch.manual_seed(1)
    layer = PackedCacheLayer(config, random_channels(2, 24), random_channels(2, 40))
    layer.update(*(torch.randn(1, 2, 70, width, device=DEVICE) for width in (24, 40)))
    view, _ = layer.update(*states[1:])
    return attention(nn.Identity(), states[0], view, view, mask, **options)[0]


@pytest.mark.parametrize(
    ("keys", "values", "dtype", "masked"),
    [
        ("2:4", "1:4", "auto", False),
        ("2:4", "2:4", "int8", True),
        ("1:4", "2:4", "bf16", True),
        ("3:4", "4:8", "int8", False),
        ("4:8", "3:4", "auto", True),
        ("auto", "auto", "int8", False),
        ("dense", "2:4", "fp16", False),
        ("2:4", "dense", "int8", False),
    ],
)
def test_attention_is_that_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, keys: str, values: str, dtype: str, masked: bool
) -> None:
    monkeypatch.setattr(gpu, "PART", 32)
    monkeypatch.setattr(gpu, "TOKENS", 16)
    config = KVConfig(keys, values, dtype=dtype, window=8, recovery="zeros" if keys == "dense" else "sign")
    states = [torch.randn(1, heads, 2, width, device=DEVICE) for heads, width in ((6, 24), (2, 24), (2, 40))]
    mask, options = None, {}
    if masked:
        mask = torch.rand(1, 1, 2, 72, device=DEVICE) < 0.7
        mask[:, :, 1] = False
        bias = torch.randn(1, 6, 2, 72, device=DEVICE)
        options = {"softcap": 5.0, "position_bias": bias, "s_aux": torch.randn(6, device=DEVICE)}
    monkeypatch.setattr(View, "_runs_triton", lambda *_: False)
    expected = output(config, states, mask, **options)
    monkeypatch.setattr(View, "_runs_triton", lambda view, call: view._is_decoding(call) and view.before == 56)
    monkeypatch.setattr(PackedTokens, "read", None)  # all packed tokens are read by the kernel
    found = output(config, states, mask, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
