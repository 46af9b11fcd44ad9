from __future__ import annotations

import pytest
import torch

from permprune.system.device import processor_has


@pytest.mark.parametrize(
    ("isa", "found"), [(None, True), ("avx512_core_amx", True), ("AVX512_CORE_BF16", False), ("AVX2", False)]
)
def test_matrix_units_count_only_where_torch_may_use_them(
    isa: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True}, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    processor_has.cache_clear()
    assert processor_has("amx_bf16") is found
    assert processor_has("avx512_bf16")
    processor_has.cache_clear()
