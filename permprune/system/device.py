"""The device on which models run, and the activation type that is fastest on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
"""The name of integers of four bits; torch cannot compute with them."""

NAMED = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "int4": INT4,
}  # fmt: skip
"""Types of numbers, by the names that options give them."""

OLDER_THAN_AMX = {
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2",
    "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16",
}  # fmt: skip
"""Values of the environment variable ONEDNN_MAX_CPU_ISA that keep torch's products from matrix units."""


def dtype_named(name: str) -> torch.dtype | None:
    """Return the type of numbers with a name of `NAMED`; None for any other name, such as "auto"."""
    return NAMED.get(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the activation type with the fastest products on this device that needs no loss scaling: bf16 or fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    multiplies = device.type == "cpu" and (processor_has("avx512_bf16") or processor_has("amx_bf16"))
    return torch.bfloat16 if multiplies else torch.float32


@cache
def processor_has(feature: str) -> bool:
    """Return whether torch's products on the CPU have instructions of this name; older releases of torch do not say.

    Matrix units (AMX) are not among them where ONEDNN_MAX_CPU_ISA is one of `OLDER_THAN_AMX`.
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    older = feature.startswith("amx") and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in OLDER_THAN_AMX
    return bool(capabilities.get(feature)) and not older


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type of products on this device in the present autocast context; None outside such a context."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_device(model: nn.Module) -> torch.device:
    """Return the device on which a model runs: that of its weights, or the best one if it has none."""
    device = next(model.parameters()).device
    return best_device() if device.type == "meta" else device


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's random numbers, by type of device: those of the CPU, and of `device`."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Set the states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
