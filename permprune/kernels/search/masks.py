"""The inner loops of the search for orders: masks of reordered columns, slopes, and the costs of moving channels.

Each function runs in native code if the tensors are fp32 and on the CPU, and in PyTorch otherwise, with the same
results up to the rounding of sums. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import native
from permprune.kernels.product.linear import has_triton
from permprune.pattern import Pattern, ranks

LARGEST_M = 64
"""The largest M for which there are native kernels."""

BLOCK = 2**18
"""Number of elements of a matrix that `place_reference` processes at a time."""


class Masking(ctypes.Structure):
    """`struct masking` of search.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("score", "places", "mask")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "size", "row_stride", "column_stride")),
        *((name, ctypes.c_int64) for name in ("mask_row_stride", "mask_column_stride")),
        *((name, ctypes.c_int32) for name in ("n", "m")),
    )


class Keeping(ctypes.Structure):
    """`struct keeping` of search.h."""

    _fields_ = (
        ("masking", Masking),
        *((name, ctypes.c_void_p) for name in ("weight", "gradient")),
        *((name, ctypes.c_int64) for name in ("weight_row_stride", "weight_column_stride")),
        *((name, ctypes.c_int64) for name in ("gradient_row_stride", "gradient_column_stride")),
        ("sums", ctypes.c_void_p),
    )


class Pruning(ctypes.Structure):
    """`struct pruning` of search.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("score", "weight", "groups", "pruned")),
        *((name, ctypes.c_int64) for name in ("channels", "rows", "count")),
        *((name, ctypes.c_int32) for name in ("n", "m")),
    )


class Placement(ctypes.Structure):
    """`struct placement` of search.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("score", "weight", "slope", "error", "curvature")),
        *((name, ctypes.c_void_p) for name in ("groups", "slots", "cost")),
        *((name, ctypes.c_int64) for name in ("channels", "rows", "count")),
        *((name, ctypes.c_int32) for name in ("n", "m")),
    )


class Applying(ctypes.Structure):
    """`struct applying` of search.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bits", "masked")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "row_stride")),
        ("number", ctypes.c_int32),
    )


def write_mask(mask: Tensor, score: Tensor, columns: Tensor, pattern: Pattern) -> None:
    """Compute the mask of some columns of a weight, in place: of every m consecutive entries of `columns`, n are kept.

    `mask` is a bool and `score` a floating-point tensor without NaN, both (rows, width). `columns`, int64 (size,),
    lists the columns in the order in which they form groups. Ties are broken in favour of the earlier column of a
    group. Raises `PermpruneError` if m does not divide the size.
    """
    if not _runs_native(pattern.m, score) or mask.device.type != "cpu":
        chosen = columns.to(score.device)
        mask[:, chosen] = pattern.mask(score[:, chosen])
        return
    places = columns.contiguous()
    masking = _masking(score, places, pattern)
    _require("a mask", mask, torch.bool, *score.shape)
    masking.mask = mask.data_ptr()
    masking.mask_row_stride, masking.mask_column_stride = mask.stride()
    native.run("mask", masking, len(score) * len(places))


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
    if not (adjacent and dtype in (torch.float32, torch.bfloat16) and _runs_native(LARGEST_M, weight)):
        return (weight * unpack_mask(bits, width)).to(dtype)
    bits, masked = bits.contiguous(), torch.empty(rows, width, dtype=dtype)
    _require("a mask", bits, torch.uint8, rows, -(-width // 8))
    pointers = [part.data_ptr() for part in (weight, bits, masked)]
    applying = Applying(*pointers, rows, width, weight.stride(0), native.NUMBERS[dtype])
    native.run("apply", applying, masked.numel())
    return masked


def kept_sum(score: Tensor, weight: Tensor, gradient: Tensor, columns: Tensor, pattern: Pattern) -> float:
    """Return the sum of weight * gradient over the weights that `write_mask` keeps.

    `score`, `weight` and `gradient` are (rows, width); `columns` is as in `write_mask`.
    """
    if not _runs_native(pattern.m, score, weight, gradient):
        chosen = columns.to(score.device)
        product = weight[:, chosen].float() * gradient[:, chosen]
        return float((product * pattern.mask(score[:, chosen])).sum(dtype=torch.float64))
    places, sums = columns.contiguous(), torch.empty(len(score), dtype=torch.float64)
    keeping = Keeping(_masking(score, places, pattern), weight.data_ptr(), gradient.data_ptr())
    keeping.weight_row_stride, keeping.weight_column_stride = weight.stride()
    keeping.gradient_row_stride, keeping.gradient_column_stride = gradient.stride()
    keeping.sums = sums.data_ptr()
    native.run("keep", keeping, len(score) * len(places))
    return float(sums.sum())


def pruned_part(weight: Tensor, score: Tensor, groups: Tensor, pattern: Pattern) -> Tensor:
    """Return the weights that the pattern prunes, and 0 where it keeps a weight: (channels, rows).

    `weight` and `score` are (channels, rows); `groups`, int64 (count, m), lists every channel once. Of each group and
    row the n largest scores are kept; ties are broken in favour of the earlier member.
    """
    weight, score = weight.contiguous(), score.contiguous()
    found = torch.empty_like(weight)
    if not _runs_native(pattern.m, weight, score):
        flat = groups.flatten().to(score.device)
        keep = pattern.mask_groups(score[flat].view(*groups.shape, -1), 1).flatten(0, 1)
        found[flat] = weight[flat].masked_fill_(keep, 0)
        return found
    groups = groups.contiguous()
    _require("groups", groups, torch.int64, len(groups), pattern.m)
    pointers = [part.data_ptr() for part in (score, weight, groups, found)]
    pruning = Pruning(*pointers, *score.shape, len(groups), pattern.n, pattern.m)
    native.run("prune", pruning, found.numel())
    return found


def add_placement_cost(
    cost: Tensor,
    score: Tensor,
    weight: Tensor,
    slope: Tensor,
    error: Tensor,
    *,
    curvature: Tensor,
    groups: Tensor,
    slots: Tensor,
    pattern: Pattern,
) -> None:
    """Add the cost of moving the free channel of each group to the free slot of every group to `cost`, in place.

    `score`, `weight`, `slope` and `error` are (channels, rows), and `curvature` is (channels,). The cost of pruning a
    weight w of channel c instead of keeping it is ((w - 2 error) * curvature[c] + slope) * w. `groups`, int64
    (count, m), lists the channels in the slots of each group, and `slots`, int64 (count,), the free slot of each group.
    In every row the moved weight is pruned unless its score exceeds the n-th largest score of the other members of the
    group; then the member with that score is pruned instead. `cost` is fp64 (count, count) on the CPU, with a row for
    each free channel and a column for each group. The result is exact up to a constant in each row.
    """
    parts = [part.contiguous() for part in (score, weight, slope, error)]
    if not (_runs_native(pattern.m, *parts) and cost.is_contiguous()):
        cost += _placement_cost(parts, curvature, groups, slots, pattern).double().cpu()
        return
    groups, slots, curvature = groups.contiguous(), slots.contiguous(), curvature.float().contiguous()
    _require("groups", groups, torch.int64, len(groups), pattern.m)
    _require("slots", slots, torch.int64, len(groups))
    _require("a curvature", curvature, torch.float32, len(score))
    _require("a cost", cost, torch.float64, len(groups), len(groups))
    pointers = [part.data_ptr() for part in (*parts, curvature, groups, slots, cost)]
    placement = Placement(*pointers, *score.shape, len(groups), pattern.n, pattern.m)
    native.run("place", placement)


def _placement_cost(parts: list[Tensor], curvature: Tensor, groups: Tensor, slots: Tensor, pattern: Pattern) -> Tensor:
    """Compute the costs that `add_placement_cost` adds, (count, count), in PyTorch or Triton."""
    score, weight, slope, error = parts

    def prune_cost(channels: Tensor) -> Tensor:
        own = weight[channels]
        return ((own - 2 * error[channels]) * curvature[channels, None] + slope[channels]) * own

    free = groups[torch.arange(len(groups)), slots]
    rest = groups[groups.ne(free[:, None])].view(len(groups), -1)
    scores = score[rest]
    last = ranks(scores, 1) == pattern.n - 1  # the last member to be kept if the free slot were empty
    threshold, rival = ((values * last).sum(1) for values in (scores, prune_cost(rest.flatten()).view_as(scores)))
    place = _gpu_place if score.is_cuda and has_triton() else place_reference
    return place(score[free], prune_cost(free), threshold, rival)


def _gpu_place(score: Tensor, own: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    from permprune.kernels.product import gpu  # needs Triton, which comes with PyTorch's builds for GPUs

    return gpu.place(score, own, threshold, rival)


def place_reference(score: Tensor, own: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    """Return the sum over rows r of rival[g, r] - own[c, r] where score[c, r] > threshold[g, r], as a matrix (c, g).

    All four arguments are (k, rows), and the result is (k, k). Rows are processed in blocks that fit in the processor's
    cache. The selection uses the kernel of ReLU's gradient, which is several times faster than a boolean mask.
    """
    cost = own.new_zeros(len(threshold), len(threshold))
    rows = max(1, BLOCK // len(threshold))
    for block in zip(*(x.split(rows, 1) for x in (score, own, threshold, rival)), strict=True):
        scores, owns, limits, rivals = (x.contiguous() for x in block)
        above, difference = torch.empty_like(limits), torch.empty_like(rivals)
        for c in range(len(cost)):
            torch.sub(scores[c], limits, out=above)
            torch.sub(rivals, owns[c], out=difference)
            torch.ops.aten.threshold_backward.grad_input(difference, above, 0, grad_input=difference)
            cost[c] += difference.sum(1)
    return cost


def _masking(score: Tensor, places: Tensor, pattern: Pattern) -> Masking:
    """Return the native structure for the columns of a score matrix; the pointer to the mask is not set.

    Raises `PermpruneError` if m does not divide the number of columns.
    """
    pattern.require_divisible(len(places), "a set of columns")
    _require("columns", places, torch.int64, len(places))
    rows, width = score.shape
    masking = Masking(score.data_ptr(), places.data_ptr(), None, rows, width, len(places), *score.stride())
    masking.n, masking.m = pattern.n, pattern.m
    return masking


def _require(what: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise `PermpruneError` unless a tensor that native code reads or writes has this type and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise PermpruneError(
            f"a step of the search has {what} of shape {tuple(tensor.shape)} and type {tensor.dtype} on "
            f"{tensor.device}: give {shape} of {dtype} on the CPU"
        )


def _runs_native(m: int, *tensors: Tensor) -> bool:
    """Return whether native code runs for tensors of one shape. Raises `PermpruneError` if their shapes differ."""
    if len({tensor.shape for tensor in tensors}) > 1:
        raise PermpruneError("a step of the search has matrices of different shapes")
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return fits and m <= LARGEST_M and native.available()
