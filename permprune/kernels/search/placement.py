"""The costs of moving channels between groups, in native code, Triton or PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.kernels import library
from permprune.kernels.search.masks import require_layout, runs_native, sizes
from permprune.pattern import Pattern, ranks

BLOCK = 2**18
"""Number of elements of a matrix that `place_reference` processes at a time."""


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
    group; then the member with that score is pruned instead. Of a pattern of pairs, whole pairs are. `cost` is fp64
    (count, count) on the CPU, with a row for each free channel and a column for each group. The result is exact up to a
    constant in each row.
    """
    matrices = [matrix.contiguous() for matrix in (score, weight, slope, error)]
    if not (runs_native(pattern, *matrices) and cost.is_contiguous()):
        cost += _placement_cost(matrices, curvature, groups, slots, pattern).double().cpu()
        return
    groups, slots, curvature = groups.contiguous(), slots.contiguous(), curvature.float().contiguous()
    require_layout("groups", groups, torch.int64, len(groups), pattern.m)
    require_layout("slots", slots, torch.int64, len(groups))
    require_layout("a curvature", curvature, torch.float32, len(score))
    require_layout("a cost", cost, torch.float64, len(groups), len(groups))
    names = ("score", "weight", "slope", "error", "curvature", "groups", "slots", "cost")
    tensors = dict(zip(names, (*matrices, curvature, groups, slots, cost), strict=True))
    library.run("place", 0, **tensors, **sizes(score, groups, pattern))


def _placement_cost(
    matrices: list[Tensor], curvature: Tensor, groups: Tensor, slots: Tensor, pattern: Pattern
) -> Tensor:
    """Compute the costs that `add_placement_cost` adds, (count, count), in PyTorch or Triton."""
    score, weight, slope, error = matrices

    def prune_cost(channels: Tensor) -> Tensor:
        pruned = weight[channels]
        return ((pruned - 2 * error[channels]) * curvature[channels, None] + slope[channels]) * pruned

    every, unit = torch.arange(len(groups)), pattern.unit
    free, units = groups[every, slots], groups.view(len(groups), -1, unit)
    holds_slot = torch.arange(units.shape[1]) == slots[:, None] // unit
    mates = units[holds_slot][units[holds_slot].ne(free[:, None])].view(len(groups), -1)
    rest = units[~holds_slot].view(len(groups), -1, unit)
    size = score if unit == 1 else score.square()
    sizes = size[rest].sum(2)
    last = ranks(sizes, 1) == pattern.n // unit - 1  # the last unit to be kept if that with the free slot were empty
    costs = prune_cost(rest.flatten()).view(*rest.shape, -1).sum(2)
    threshold, rival = ((values * last).sum(1) for values in (sizes, costs))
    place = place_reference
    if library.runs_triton(score.device.type):
        from permprune.kernels.search import gpu  # needs Triton, which comes with PyTorch's builds for GPUs

        place = gpu.place
    if unit == 1:
        return place(score[free], prune_cost(free), threshold, rival)
    mate = prune_cost(mates.flatten()).view(*mates.shape, -1).sum(1)  # the others of the unit share the channel's fate
    placed = place(size[free], prune_cost(free), threshold - size[mates].sum(1), rival - mate)
    return placed + mate.sum(1)


def place_reference(score: Tensor, cost: Tensor, threshold: Tensor, rival: Tensor) -> Tensor:
    """Return the sum over rows r of rival[g, r] - cost[c, r] where score[c, r] > threshold[g, r], as a matrix (c, g).

    All four arguments are (k, rows), and the result is (k, k). Rows are processed in blocks that fit in the processor's
    cache. The selection uses the kernel of ReLU's gradient, which is several times faster than a boolean mask.
    """
    sums = cost.new_zeros(len(threshold), len(threshold))
    rows = max(1, BLOCK // len(threshold))
    for block in zip(*(x.split(rows, 1) for x in (score, cost, threshold, rival)), strict=True):
        scores, costs, limits, rivals = (x.contiguous() for x in block)
        above, difference = torch.empty_like(limits), torch.empty_like(rivals)
        for c in range(len(sums)):
            torch.sub(scores[c], limits, out=above)
            torch.sub(rivals, costs[c], out=difference)
            torch.ops.aten.threshold_backward.grad_input(difference, above, 0, grad_input=difference)
            sums[c] += difference.sum(1)
    return sums
