"""Views that expose several tensors stored in one, such as fused query, key and value projections.

If a view splits a dimension and every user of the result takes pieces along one of the new dimensions, each piece is
labelled as a separate tensor. Their axes then stay independent: the channels of the values, for example, do not have
to be permuted with those of the queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from permprune.coupling.axes import Axis, Label, align, factor
from permprune.coupling.walk import (
    IDENTITIES,
    Composite,
    Walk,
    arguments,
    fresh,
    moved_dims,
    op_name,
    place,
    reordered,
    segments,
    shape_of,
    shapes_of,
)

_TAKERS = frozenset({"unbind", "select", "slice", "split", "split_with_sizes", "chunk", "index"})


@dataclass(frozen=True)
class Stack(Composite):
    """Labels of consecutive pieces of a tensor along `dim`; piece i is the range bounds[i] to bounds[i + 1]."""

    dim: int
    bounds: tuple[int, ...]
    labels: tuple[Label, ...]

    def step(self, walk: Walk, node: Node) -> Any:
        """The label of a node that moves the dimensions of this stack or takes pieces of it."""
        if (order := moved_dims(node)) is not None:
            labels = tuple(reordered(label, order) for label in self.labels)
            return replace(self, dim=order.index(self.dim), labels=labels)
        pieces = _pieces(walk, node, self.dim)
        if pieces is None:
            raise AssertionError(f"{node} takes no piece of its stack")
        whole = op_name(node) in ("select", "unbind")
        taken = [self.labels[self.bounds.index(start)] for start, _ in pieces]
        if whole:
            taken = [label[: self.dim] + label[self.dim + 1 :] for label in taken]
        return taken if isinstance(node.meta["val"], (list, tuple)) else taken[0]


def stacked(walk: Walk, node: Node, label: Label) -> Stack | None:
    """The `Stack` that a view of a tensor with this label creates; None if the view is not a stack."""
    shape = shape_of(node)
    for source, (first, last) in _splits(shape_of(node.args[0]), shape):
        axis = label[source]
        for dim in range(first, last - 1):
            pieces = _taken(walk, node, dim) if axis else None
            if axis and pieces and len(pieces) > 1 and all(a[1] <= b[0] for a, b in itertools.pairwise(pieces)):
                points = sorted({0, shape[dim], *itertools.chain(*pieces)})
                reason = f"indices regrouped by {place(node)}"
                piece_labels = _split(axis, shape[first:last], dim - first, points, reason)
                if piece_labels is None:
                    return None
                front, back = fresh(shape[:first]), fresh(shape[last:])
                align(label[:source], front, reason)
                align(label[source + 1 :], back, reason)
                return Stack(dim, tuple(points), tuple((*front, *piece, *back) for piece in piece_labels))
    return None


def _split(axis: Axis, shape: Sequence[int], dim: int, points: Sequence[int], reason: str) -> list[Label] | None:
    """View an axis as `shape` and cut it along dimension `dim` at `points`; the label of each piece.

    Returns None if the structure of the axis does not allow it.
    """
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    halves = factor(axis, outer, reason) if outer > 1 else (Axis(1), axis)
    if halves is None:
        return None
    outside = fresh(shape[:dim])
    align([halves[0]], outside, reason)
    sizes = [stop - start for start, stop in itertools.pairwise(points)]
    labels = []
    for size, segment in zip(sizes, segments(halves[1], [size * inner for size in sizes], reason), strict=True):
        inside = fresh((size, *shape[dim + 1 :]))
        align([segment], inside, reason)
        labels.append((*outside, *inside))
    return labels


def _splits(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (old dimension, (first, last)) for each dimension that a view splits into the new dimensions first:last."""
    for source, size in enumerate(before):
        head, tail = math.prod(before[:source]), math.prod(before[source + 1 :])
        for first in range(len(after)):
            for last in range(len(after), first + 1, -1):
                if (
                    size > 1
                    and math.prod(after[first:last]) == size
                    and (math.prod(after[:first]), math.prod(after[last:])) == (head, tail)
                    and after[first] > 1
                    and after[last - 1] > 1
                ):
                    yield source, (first, last)


def _taken(walk: Walk, node: Node, dim: int) -> list[tuple[int, int]] | None:
    """The (start, stop) of all pieces taken along a dimension; None if the tensor is used in any other way."""
    pieces: set[tuple[int, int]] = set()
    for user in node.users:
        if user.op != "call_function":
            return None
        if op_name(user).startswith("_assert"):
            continue
        if user.args[0] is not node:
            return None
        if (order := moved_dims(user)) is not None:
            taken = _taken(walk, user, order.index(dim)) if dim in order else None
        else:
            taken = _pieces(walk, user, dim)
        if taken is None:
            return None
        pieces.update(taken)
    return sorted(pieces)


def _pieces(walk: Walk, node: Node, dim: int) -> list[tuple[int, int]] | None:
    """The (start, stop) of the pieces that a node takes of its first argument along `dim`; None for any other op."""
    name, shape = op_name(node), shape_of(node.args[0])
    bound = arguments(node) if name in _TAKERS else {}
    if name == "index":
        return _run(walk, bound["indices"], dim, shape[dim])
    if name not in _TAKERS or bound["dim"] % len(shape) != dim:
        return None
    if name == "unbind":
        return [(start, start + 1) for start in range(shape[dim])]
    if name == "select":
        start = bound["index"]
        return [(start % shape[dim], start % shape[dim] + 1)] if isinstance(start, int) else None
    if name == "slice":
        if not all(isinstance(bound[end], (int, type(None))) for end in ("start", "end")):
            return None
        start, stop, step = slice(bound["start"], bound["end"], bound["step"]).indices(shape[dim])
        return [(start, stop)] if step == 1 and start < stop else None
    ends = list(itertools.accumulate((piece[dim] for piece in shapes_of(node)), initial=0))
    return list(itertools.pairwise(ends))


def _run(walk: Walk, indices: Sequence[Node | None], dim: int, size: int) -> list[tuple[int, int]] | None:
    """The piece that indexing takes, if the indices are constant, consecutive and only along `dim`; else None."""
    if [place for place, index in enumerate(indices) if index is not None] != [dim]:
        return None
    source: Any = indices[dim]
    while source not in walk.constants and op_name(source) in IDENTITIES:
        source = source.args[0]
    index = walk.constants.get(source)
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        return None
    picked = [int(place) % size for place in index]
    return [(picked[0], picked[-1] + 1)] if picked == list(range(picked[0], picked[0] + len(picked))) else None
