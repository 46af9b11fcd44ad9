"""Packed keys and values of tokens, in native code: what they consist of, and unpacking.

Packed states are named parts, each (batch, heads, tokens, size of the part), as `permprune.kv.packing` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.attention.codes import CODED, kept_count, plane_bytes
from permprune.kernels.product.layout import FLOATS
from permprune.pattern import Pattern

WIDEST = 256
"""The most channels of a head."""

SCALED = (torch.int8, *CODED)
"""The types of kept values that are integers, with a scale for each token and head."""

NUMBERS = library.NUMBERS | {dtype: len(library.NUMBERS) + bits - 2 for dtype, bits in CODED.items()}
"""The numbers of the types of kept values in the library."""


class PackedStates:
    """Packed states of tokens as the library reads them, (batch, heads, tokens); they hold the tensors.

    `parts` are as in `permprune.kv.packing`, and `level` is fp32 (heads, width); without a `pattern` all channels are
    kept. Values are of type `dtype`. Raises `PermpruneError` if the parts do not match, or are not contiguous or not on
    the CPU.
    """

    def __init__(self, parts: Mapping[str, Tensor], level: Tensor, pattern: Pattern | None, dtype: torch.dtype) -> None:
        values, (heads, width) = parts["values"], level.shape
        sizes = part_sizes(dtype, width, pattern, recovers="amplitude" in parts)
        fits = parts.keys() == sizes.keys() and values.shape[1] == heads and width <= WIDEST
        for name, part in parts.items() if fits else ():
            size, kind = sizes[name]
            fits &= part.shape == (*values.shape[:3], size) and part.dtype == kind and is_reachable(part)
        if not fits or level.dtype != torch.float32 or not is_reachable(level):
            raise PermpruneError(
                f"packed states of {width} channels have parts that do not match or are not on the CPU"
            )
        self.parts, self.level, self.shape, self.width = dict(parts), level, tuple(values.shape[:3]), width
        members = _members(self.parts, level if "amplitude" in parts else None, width, pattern, dtype)
        self.struct = library.structure("states", **members)

    def unpack(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `first` to `first` + `count`, with pruned channels zero or recovered.

        Returns (batch, heads, count, width) of fp32, bf16 or fp16, in the stored order. Raises `PermpruneError` for
        another type, tokens out of range, or a code that does not keep its pattern.
        """
        batch, heads, tokens = self.shape
        if dtype not in FLOATS or not 0 <= first <= first + count <= tokens:
            raise PermpruneError(f"{count} of {tokens} packed tokens from {first} on cannot be unpacked to {dtype}")
        output = torch.empty(batch, heads, count, self.width, dtype=dtype, device="cpu")
        sizes = {"batch": batch, "heads": heads, "first": first, "count": count, "number": NUMBERS[dtype]}
        library.run("unpack_states", output.numel(), states=self.struct, output=output, **sizes)
        return output


def part_sizes(
    dtype: torch.dtype, width: int, pattern: Pattern | None, *, recovers: bool
) -> dict[str, tuple[int, torch.dtype]]:
    """Return the size and the type of each part of packed states; none for values of a type that is not stored.

    `recovers` is whether pruned channels are recovered by their signs.
    """
    if dtype not in (*SCALED, *FLOATS):
        return {}
    kept = kept_count(pattern, width)
    sizes = {"values": (kept, dtype)}
    if dtype in CODED:
        sizes = {"values": (CODED[dtype] * plane_bytes(width), torch.uint8)}
    if dtype in SCALED:
        sizes["scale"] = (1, torch.bfloat16)
    if pattern is not None:
        sizes["code"] = (-(-width // 8), torch.uint8)
        if recovers:
            sizes["signs"] = (-(-(width - kept) // 8), torch.uint8)
            sizes["amplitude"] = (1, torch.uint8 if dtype in SCALED else dtype)
    return sizes


def token_bytes(dtype: torch.dtype, width: int, pattern: Pattern | None = None, *, recovers: bool = False) -> int:
    """Return the bytes of a token of a head of packed states. Arguments are those of `part_sizes`."""
    return sum(count * kind.itemsize for count, kind in part_sizes(dtype, width, pattern, recovers=recovers).values())


def is_reachable(tensor: Tensor) -> bool:
    """Return whether the library can read a tensor by its pointer alone."""
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def _members(
    parts: Mapping[str, Tensor], level: Tensor | None, width: int, pattern: Pattern | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the members of a `states` structure with values of type `dtype`."""
    values = parts["values"]
    return {
        **parts,
        "level": level,
        "tokens": values.shape[:3].numel(),
        "width": width,
        "kept": kept_count(pattern, width),
        "code_bytes": parts["code"].shape[-1] if "code" in parts else 0,
        "sign_bytes": parts["signs"].shape[-1] if "signs" in parts else 0,
        "number": NUMBERS[dtype],
        "kind": pattern is not None,
    }
