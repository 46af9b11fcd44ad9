"""Native packing of keys and values for the pruned cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.attention.codes import kept_count
from permprune.kernels.attention.native import NUMBERS, WIDEST, States, kind_of, part_sizes
from permprune.kernels.product.layout import FLOATS
from permprune.pattern import Pattern


class Packing(ctypes.Structure):
    """`struct packing` of cache.h."""

    _fields_ = (
        ("states", States),
        ("from", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "count", "n", "m", "turns")),
        ("number", ctypes.c_int32),
    )


def packs(states: Tensor, dtype: torch.dtype) -> bool:
    """Return whether native kernels pack these states, (batch, heads, tokens, width), to values of type `dtype`."""
    fits = states.dtype in FLOATS and states.device.type == "cpu" and states.shape[-1] <= WIDEST
    return fits and dtype in NUMBERS and native.available()


def pack(
    states: Tensor,
    weight: Tensor,
    level: Tensor,
    pattern: Pattern,
    *,
    dtype: torch.dtype,
    signs: bool,
    turns: int,
) -> dict[str, Tensor]:
    """Return the parts of packed states as `permprune.kv.packing` describes them.

    `states` is (batch, heads, tokens, width) of fp32, bf16 or fp16; `weight` and `level` are fp32 (heads, width). Kept
    channels and amplitudes are fitted to each other in `turns` turns. Raises `PermpruneError` if these do not match or
    are not on the CPU, or heads have more than `WIDEST` channels.
    """
    batch, heads, count, width = states.shape
    fits = packs(states, dtype) and pattern.divides(width)
    for own in (weight, level):
        fits &= own.shape == (heads, width) and own.dtype == torch.float32 and own.device.type == "cpu"
    if not fits:
        raise PermpruneError(f"states of shape {tuple(states.shape)} and their channels do not match {pattern}")
    if states.stride(-1) != 1:
        states = states.contiguous()
    weight, level = weight.contiguous(), level.contiguous()
    sizes = part_sizes(dtype, width, pattern, recovers=signs)
    parts = {name: torch.empty(batch, heads, count, size, dtype=own) for name, (size, own) in sizes.items()}
    struct = States(
        **{name: part.data_ptr() for name, part in parts.items()},
        level=level.data_ptr(),
        tokens=batch * heads * count,
        width=width,
        kept=kept_count(pattern, width),
        code_bytes=sizes["code"][0],
        sign_bytes=sizes["signs"][0] if "signs" in sizes else 0,
        number=NUMBERS[dtype],
        kind=kind_of(pattern),
    )
    job = Packing(
        struct,
        states.data_ptr(),
        weight.data_ptr(),
        (ctypes.c_int64 * 3)(*states.stride()[:3]),
        batch,
        heads,
        count,
        pattern.n,
        pattern.m,
        turns if signs else 0,
        native.NUMBERS[states.dtype],
    )
    native.run("pack_states", job, states.numel() * 10)
    return parts
