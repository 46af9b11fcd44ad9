"""Axes: symbolic identities of tensor dimensions, tracked through a network.

Every tensor dimension is labelled with an `Axis`. Two dimensions share an axis if they have to be permuted together:
index i of one always corresponds to index i of the other. An axis is one of

* an *atom*, which has no structure;
* a row-major *product* of axes, e.g. 576 channels viewed as 9 heads of 64;
* a *concatenation* of axes, e.g. the pieces that a slice cuts a dimension into.

Axes are nodes of a union-find forest. An atom can be replaced by a product or a concatenation at any time, so structure
found late in the graph also applies to the tensors and parameters labelled before.

A *frozen* axis must not be permuted. Freezing is always safe, and it is the fallback wherever two structures cannot be
reconciled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Label = tuple["Axis | None", ...]
"""The axes of a tensor, one per dimension; None for a dimension of size 1, for which there is nothing to permute."""


@dataclass(frozen=True)
class Lookup:
    """Row i of a tensor was looked up at index `key[i]` of `axis`, e.g. the weights of the expert of token i."""

    axis: Axis
    key: object


@dataclass(eq=False, slots=True)
class Axis:
    """A node of the union-find forest.

    `size` is valid for every node; the other attributes are valid only for the root, which `find` returns.
    """

    size: int
    reason: str = ""  # why the axis is frozen; empty if it is not
    lookups: tuple[Lookup, ...] = ()
    kind: Literal["atom", "product", "concat"] = "atom"
    parts: list[Axis] = field(default_factory=list)
    parent: Axis | None = None


def find(axis: Axis) -> Axis:
    """The root of an axis's union-find tree, with path compression."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def freeze(*axes: Axis | None, reason: str) -> None:
    """Forbid permutations of the axes and of all their parts. An atom that is already frozen keeps its reason."""
    for root in (find(axis) for axis in axes if axis is not None):
        freeze(*root.parts, reason=reason)
        if root.kind == "atom" and not root.reason:
            root.reason = reason


def product(parts: Iterable[Axis]) -> Axis:
    """The row-major product of axes; factors of size 1 are dropped."""
    return _compose("product", [part for part in parts if part.size != 1] or [Axis(1)])


def concat(parts: Iterable[Axis | None]) -> Axis:
    """The concatenation of axes, where None stands for an axis of size 1."""
    return _compose("concat", [Axis(1) if part is None else part for part in parts])


def unify(first: Axis | None, second: Axis | None, reason: str) -> None:
    """Merge two axes that have to be permuted together; if their structures do not fit, freeze both for `reason`."""
    if first is None or second is None:
        return
    a, b = find(first), find(second)
    if a is b:
        return
    if a.size != b.size:
        freeze(a, b, reason=reason)
        return
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        if a.reason:
            freeze(b, reason=a.reason)
    elif not _unify_structures(a, b, reason):
        freeze(a, b, reason=reason)
        return
    a, b = find(a), find(b)
    if a is not b:
        lookups = tuple(dict.fromkeys(a.lookups + b.lookups))
        b.lookups, a.parent = lookups, b
        for one, other in itertools.combinations(lookups, 2):
            if one.key is other.key and one.axis.size == other.axis.size:
                unify(one.axis, other.axis, reason)


def align(left: Iterable[Axis | None], right: Iterable[Axis | None], reason: str) -> bool:
    """Unify two row-major products of axes, splitting factors where needed, as the input and output of a view.

    Returns False, and freezes the axes not yet unified, if a factor cannot be split to fit.
    """
    a_side, b_side = ([axis for axis in side if axis is not None and axis.size != 1] for side in (left, right))
    while a_side and b_side:
        a, b = find(a_side.pop(0)), find(b_side.pop(0))
        if a.kind == "product" or b.kind == "product":
            a_side[:0] = a.parts if a.kind == "product" else [a]
            b_side[:0] = b.parts if b.kind == "product" else [b]
        elif a.size == b.size:
            unify(a, b, reason)
        elif a.size > b.size:
            if (halves := factor(a, b.size, reason)) is None:
                freeze(a, b, *a_side, *b_side, reason=reason)
                return False
            unify(halves[0], b, reason)
            a_side.insert(0, halves[1])
        else:
            a_side.insert(0, a)
            b_side.insert(0, b)
            a_side, b_side = b_side, a_side
    return True


def factor(axis: Axis, outer: int, reason: str) -> tuple[Axis, Axis] | None:
    """Split an axis into a product (axis of size `outer`, rest); None if its structure does not allow it."""
    root = find(axis)
    if outer < 1 or root.size % outer:
        return None
    inner = root.size // outer
    if root.kind == "atom":
        parts = (Axis(outer, root.reason), Axis(inner, root.reason))
        _restructure(root, "product", list(parts))
        return parts
    if root.kind == "product":
        parts = (Axis(outer), Axis(inner))
        return parts if align(root.parts, parts, reason) else None
    if any(part.size % inner for part in root.parts):
        return None
    outers, inners = [], []
    for part in list(root.parts):
        halves = (Axis(1), part) if part.size == inner else factor(part, part.size // inner, reason)
        if halves is None:
            return None
        outers.append(halves[0])
        inners.append(halves[1])
    for other in inners[1:]:
        unify(inners[0], other, reason)
    parts = (concat(outers), inners[0])
    _restructure(root, "product", list(parts))
    return parts


def cut(axis: Axis, points: Sequence[int]) -> list[Axis] | None:
    """Split an axis into a concatenation at the given positions, in ascending order and without 0 and the size.

    Returns None if the structure of the axis does not allow it.
    """
    root = find(axis)
    if not points:
        return [root]
    if root.kind == "concat":
        return _cut_concat(root, points)
    if root.kind == "atom":
        bounds = [0, *points, root.size]
        segments = [Axis(stop - start, root.reason) for start, stop in itertools.pairwise(bounds)]
    else:
        head, *rest = root.parts
        inner = root.size // head.size
        if any(point % inner for point in points):
            return None
        heads = cut(head, [point // inner for point in points])
        if heads is None:
            return None
        segments = [product([part, *rest]) for part in heads]
    _restructure(root, "concat", segments)
    return segments


@dataclass(frozen=True)
class Loop:
    """One level of a nested loop over a dimension: the indices of `axis` (a root) are `stride` elements apart."""

    axis: Axis
    stride: int


@dataclass(frozen=True)
class Occurrence:
    """The positions of an atom in dimension `dim` of a tensor.

    Index i of the atom is at offset + stride * i + the offsets of the `siblings`: the loops over the other factors.
    """

    dim: int
    atom: Axis
    stride: int
    offset: int
    siblings: tuple[Loop, ...]


def occurrences(label: Label) -> Iterator[Occurrence]:
    """Yield every occurrence of an atom in the structure of a tensor's axes."""
    for dim, axis in enumerate(label):
        if axis is not None:
            yield from _occurrences(dim, axis)


def _occurrences(
    dim: int, axis: Axis, stride: int = 1, offset: int = 0, around: tuple[Loop, ...] = ()
) -> Iterator[Occurrence]:
    root = find(axis)
    if root.kind == "atom":
        yield Occurrence(dim, root, stride, offset, around)
    elif root.kind == "concat":
        for part in root.parts:
            yield from _occurrences(dim, part, stride, offset, around)
            offset += stride * part.size
    else:
        strides = _strides(root.parts, stride)
        nested = [loops(part, step) for part, step in zip(root.parts, strides, strict=True)]
        for place, part in enumerate(root.parts):
            siblings = itertools.chain(around, *nested[:place], *nested[place + 1 :])
            yield from _occurrences(dim, part, strides[place], offset, tuple(siblings))


def loops(axis: Axis, stride: int = 1) -> tuple[Loop, ...]:
    """The factors of an axis as nested loops, outermost first; a concatenation counts as one loop over its length."""
    root = find(axis)
    if root.kind != "product":
        return (Loop(root, stride),)
    strides = _strides(root.parts, stride)
    return tuple(loop for part, step in zip(root.parts, strides, strict=True) for loop in loops(part, step))


def _compose(kind: Literal["product", "concat"], parts: list[Axis]) -> Axis:
    return parts[0] if len(parts) == 1 else _restructure(Axis(0), kind, parts)


def _restructure(root: Axis, kind: Literal["product", "concat"], parts: list[Axis]) -> Axis:
    sizes = [part.size for part in parts]
    root.size = math.prod(sizes) if kind == "product" else sum(sizes)
    root.kind, root.parts, root.reason = kind, parts, ""
    return root


def _unify_structures(a: Axis, b: Axis, reason: str) -> bool:
    if a.kind == b.kind == "product":
        return align(a.parts, b.parts, reason)
    if a.kind == b.kind == "concat":
        points = sorted({*_boundaries(a), *_boundaries(b)})
        left, right = cut(a, points), cut(b, points)
        if left is None or right is None:
            return False
        for x, y in zip(left, right, strict=True):
            unify(x, y, reason)
        return True
    whole, joined = (a, b) if a.kind == "product" else (b, a)
    if cut(whole, _boundaries(joined)) is None and factor(joined, find(whole.parts[0]).size, reason) is None:
        return False
    return _unify_structures(find(a), find(b), reason)


def _boundaries(root: Axis) -> list[int]:
    return list(itertools.accumulate(part.size for part in root.parts[:-1]))


def _cut_concat(root: Axis, points: Sequence[int]) -> list[Axis] | None:
    segments: list[list[Axis]] = [[]]
    position = 0
    for part in list(root.parts):
        stop = position + part.size
        pieces = cut(part, [point - position for point in points if position < point < stop])
        if pieces is None:
            return None
        for piece in pieces:
            if position in points and segments[-1]:
                segments.append([])
            segments[-1].append(piece)
            position += piece.size
    root.parts = [piece for segment in segments for piece in segment]
    return [concat(segment) for segment in segments]


def _strides(parts: Sequence[Axis], stride: int) -> list[int]:
    sizes = [part.size for part in parts]
    return [stride * math.prod(sizes[position + 1 :]) for position in range(len(parts))]
