"""Masks of reordered columns, as bits and applied to weights, and sums over the weights that they keep.

Each function runs in native code if the tensors are fp32 and on the CPU, and in PyTorch otherwise, with the same
results up to the rounding of sums. Results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.pattern import Pattern

LARGEST_M = 64
"""The largest M for which there are native kernels."""


def write_mask(mask: Tensor, score: Tensor, columns: Tensor, pattern: Pattern) -> None:
    """Compute the mask of some columns of a weight, in place: of every m consecutive entries of `columns`, n are kept.

    `mask` is a bool and `score` a floating-point tensor without NaN, both (rows, width). `columns`, int64 (size,),
    lists the columns in the order in which they form groups. Ties are broken in favour of the earlier column of a
    group. Raises `PermpruneError` if m does not divide the size.
    """
    if not runs_native(pattern, score) or mask.device.type != "cpu":
        chosen = columns.to(score.device)
        mask[:, chosen] = pattern.mask(score[:, chosen])
        return
    require_layout("a mask", mask, torch.bool, *score.shape)
    job = {**_columns(score, columns, pattern), "mask": mask, "mask_stride": mask.stride()}
    library.run("mask", len(score) * len(columns), **job)


def pack_mask(mask: Tensor) -> Tensor:
    """Return a bool mask (rows, channels) as bits, uint8 (rows, ceil(channels / 8)); channel 0 is the highest."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1))
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (padded << torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)).sum(2)
    return packed.to(torch.uint8)


def unpack_mask(bits: Tensor, channels: int) -> Tensor:
    """Undo `pack_mask`: bool (rows, channels)."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=channels).view(bool))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(1)[:, :channels]


def apply_mask(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight with zeros where the mask of `pack_mask` has none: a new tensor (rows, channels) of `dtype`."""
    rows, width = weight.shape
    adjacent = width == 1 or weight.stride(1) == 1
    if not (adjacent and dtype in (torch.float32, torch.bfloat16) and runs_native(None, weight)):
        return (weight * unpack_mask(bits, width)).to(dtype)
    masked = weight.new_empty(rows, width, dtype=dtype)
    require_layout("a mask", bits, torch.uint8, rows, -(-width // 8))
    library.run(
        "apply",
        masked.numel(),
        weight=weight,
        bits=bits.contiguous(),
        masked=masked,
        rows=rows,
        width=width,
        row_stride=weight.stride(0),
        number=library.NUMBERS[dtype],
    )
    return masked


def kept_sum(score: Tensor, weight: Tensor, gradient: Tensor, columns: Tensor, pattern: Pattern) -> float:
    """Return the sum of weight * gradient over the weights that `write_mask` keeps.

    `score`, `weight` and `gradient` are (rows, width); `columns` is as in `write_mask`.
    """
    if not runs_native(pattern, score, weight, gradient):
        chosen = columns.to(score.device)
        product = weight[:, chosen].float() * gradient[:, chosen]
        return float((product * pattern.mask(score[:, chosen])).sum(dtype=torch.float64))
    sums = score.new_empty(len(score), dtype=torch.float64)
    library.run(
        "keep",
        len(score) * len(columns),
        masking=_columns(score, columns, pattern),
        weight=weight,
        gradient=gradient,
        weight_stride=weight.stride(),
        gradient_stride=gradient.stride(),
        sums=sums,
    )
    return float(sums.sum())


def pruned_weights(weight: Tensor, score: Tensor, groups: Tensor, pattern: Pattern) -> Tensor:
    """Return the weights that the pattern prunes, and 0 where it keeps a weight: (channels, rows).

    `weight` and `score` are (channels, rows); `groups`, int64 (count, m), lists every channel once. Of each group and
    row the n largest scores are kept; ties are broken in favour of the earlier member.
    """
    weight, score = weight.contiguous(), score.contiguous()
    pruned = torch.empty_like(weight)
    if not runs_native(pattern, weight, score):
        flat = groups.flatten().to(score.device)
        keep = pattern.mask_groups(score[flat].view(*groups.shape, -1), 1).flatten(0, 1)
        pruned[flat] = weight[flat].masked_fill_(keep, 0)
        return pruned
    require_layout("groups", groups, torch.int64, len(groups), pattern.m)
    members = {"score": score, "weight": weight, "groups": groups.contiguous(), "pruned": pruned}
    library.run("prune", pruned.numel(), **members, **sizes(score, groups, pattern))
    return pruned


def sizes(score: Tensor, groups: Tensor, pattern: Pattern) -> dict[str, int]:
    """Return the sizes in a native job for scores (channels, rows) and groups of channels (count, m)."""
    channels, rows = score.shape
    return {"channels": channels, "rows": rows, "count": len(groups), "n": pattern.n, "m": pattern.m}


def require_layout(what: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise `PermpruneError` unless a tensor that native code reads or writes has this type and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise PermpruneError(
            f"a step of the search has {what} of shape {tuple(tensor.shape)} and type {tensor.dtype} on "
            f"{tensor.device}: give {shape} of {dtype} on the CPU"
        )


def runs_native(pattern: Pattern | None, *tensors: Tensor) -> bool:
    """Return whether native code runs for a pattern, if one is needed, and tensors of one shape.

    Raises `PermpruneError` if their shapes differ.
    """
    if len({tensor.shape for tensor in tensors}) > 1:
        raise PermpruneError("a step of the search has matrices of different shapes")
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    known = pattern is None or (pattern.m <= LARGEST_M and pattern.unit == 1)
    return fits and known and library.available()


def _columns(score: Tensor, columns: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Return the members of a `mask` job that describe columns of a score matrix.

    Raises `PermpruneError` if m does not divide the number of columns.
    """
    pattern.require_divisible(len(columns), "a set of columns")
    require_layout("columns", columns, torch.int64, len(columns))
    rows, width = score.shape
    return {
        "score": score,
        "places": columns.contiguous(),
        "rows": rows,
        "width": width,
        "size": len(columns),
        "score_stride": score.stride(),
        "n": pattern.n,
        "m": pattern.m,
    }
