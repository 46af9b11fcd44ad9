"""Packed keys and values of tokens, in native code: what they consist of, packing and unpacking.

Packed states are named parts, each (batch, heads, tokens, size of the part), as `permprune.kv.packing` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.codes import INT5, PLANES, code_bytes, kept_count
from permprune.kernels.product.layout import FLOATS
from permprune.pattern import Pattern

WIDEST = 256
"""The most channels of a head."""

SCALED = (torch.int8, INT5)
"""The types of kept values that are integers, with a scale for each token and head."""

NUMBERS = {**library.NUMBERS, INT5: len(library.NUMBERS)}
"""The numbers of the types of kept values in the library."""

_EVERY, _BITS, _ONE_OF_4 = range(3)
"""The numbers of codes: `enum channels` of attention.h."""


class PackedStates:
    """Packed states of tokens as the library reads them, (batch, heads, tokens); they hold the tensors.

    `parts` are as in `permprune.kv.packing`, and `level` is fp32 (heads, width); without a `pattern` all channels are
    kept. Raises `PermpruneError` if the parts do not match, or are not contiguous or not on the CPU.
    """

    def __init__(self, parts: Mapping[str, Tensor], level: Tensor, pattern: Pattern | None) -> None:
        values, (heads, width) = parts["values"], level.shape
        sizes = part_sizes(values.dtype, width, pattern, recovers="amplitude" in parts)
        fits = parts.keys() == sizes.keys() and values.shape[1] == heads and width <= WIDEST
        for name, part in parts.items() if fits else ():
            size, dtype = sizes[name]
            fits &= part.shape == (*values.shape[:3], size) and part.dtype == dtype and is_reachable(part)
        if not fits or level.dtype != torch.float32 or not is_reachable(level):
            raise PermpruneError(
                f"packed states of {width} channels have parts that do not match or are not on the CPU"
            )
        self.parts, self.level, self.shape, self.width = dict(parts), level, tuple(values.shape[:3]), width
        members = _members(self.parts, level if "amplitude" in parts else None, width, pattern)
        self.struct = library.structure("states", **members)

    def unpack(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `first` to `first` + `count`, with pruned channels zero or recovered.

        Returns (batch, heads, count, width) of fp32, bf16 or fp16, in the stored order. Raises `PermpruneError` for
        another type, tokens out of range, or a code that does not keep its pattern.
        """
        batch, heads, tokens = self.shape
        if dtype not in FLOATS or not 0 <= first <= first + count <= tokens:
            raise PermpruneError(f"{count} of {tokens} packed tokens from {first} on cannot be unpacked to {dtype}")
        output = torch.empty(batch, heads, count, self.width, dtype=dtype)
        sizes = {"batch": batch, "heads": heads, "first": first, "count": count, "number": NUMBERS[dtype]}
        library.run("unpack_states", output.numel(), states=self.struct, output=output, **sizes)
        return output


def packs(states: Tensor, dtype: torch.dtype) -> bool:
    """Return whether native kernels pack these states, (batch, heads, tokens, width), to values of type `dtype`."""
    fits = states.dtype in FLOATS and states.device.type == "cpu" and states.shape[-1] <= WIDEST
    return fits and dtype in NUMBERS and library.available()


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
    for tensor in (weight, level):
        fits &= tensor.shape == (heads, width) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    if not fits:
        raise PermpruneError(f"states of shape {tuple(states.shape)} and their channels do not match {pattern}")
    if states.stride(-1) != 1:
        states = states.contiguous()
    sizes = part_sizes(dtype, width, pattern, recovers=signs)
    parts = {name: torch.empty(batch, heads, count, size, dtype=kind) for name, (size, kind) in sizes.items()}
    library.run(
        "pack_states",
        states.numel() * 10,
        states=_members(parts, level.contiguous(), width, pattern),
        numbers=states,
        weight=weight.contiguous(),
        stride=states.stride()[:3],
        batch=batch,
        heads=heads,
        count=count,
        n=pattern.n,
        m=pattern.m,
        turns=turns if signs else 0,
        number=NUMBERS[states.dtype],
    )
    return parts


def part_sizes(
    dtype: torch.dtype, width: int, pattern: Pattern | None, *, recovers: bool
) -> dict[str, tuple[int, torch.dtype]]:
    """Return the size and the type of each part of packed states; none for values of a type that is not stored.

    `recovers` is whether pruned channels are recovered by their signs.
    """
    if dtype not in (*SCALED, *FLOATS):
        return {}
    kept = kept_count(pattern, width)
    sizes = {"values": (-(-kept // 2) if dtype == INT5 else kept, dtype)}
    if dtype in SCALED:
        sizes["scale"] = (1, torch.bfloat16)
    if pattern is not None:
        sizes["code"] = (code_bytes(pattern, width), torch.uint8)
        if recovers:
            sizes["signs"] = (-(-(width - kept) // 8), torch.uint8)
            sizes["amplitude"] = (1, torch.uint8 if dtype in SCALED else dtype)
    if dtype == INT5:
        sizes["signs"] = (-(-width // 8), torch.uint8)
    return sizes


def is_reachable(tensor: Tensor) -> bool:
    """Return whether the library can read a tensor by its pointer alone."""
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def _members(parts: Mapping[str, Tensor], level: Tensor | None, width: int, pattern: Pattern | None) -> dict[str, Any]:
    """Return the members of a `states` structure."""
    values, code = parts["values"], _EVERY
    if pattern is not None:
        code = _ONE_OF_4 + pattern.n - 1 if pattern in PLANES else _BITS
    return {
        **parts,
        "level": level,
        "tokens": values.shape[:3].numel(),
        "width": width,
        "kept": kept_count(pattern, width),
        "code_bytes": parts["code"].shape[-1] if "code" in parts else 0,
        "sign_bytes": parts["signs"].shape[-1] if "signs" in parts else 0,
        "number": NUMBERS[values.dtype],
        "kind": code,
    }
