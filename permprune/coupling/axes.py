"""Axes: the identities that indices carry through a network.

Every tensor dimension is labelled with an `Axis`. Two dimensions share an axis when index i of one must stay
index i of the other, whatever order the channels are in. An axis is an *atom*; or an ordered *product* of
axes, row-major, as a view of 576 channels into 9 heads of 64 makes it; or an ordered *concatenation* of axes,
as a slice makes it. Axes are nodes of a union-find forest, and an atom may be given a structure at any time,
so what is found late in the graph holds for every tensor and parameter before it.

A *frozen* axis must keep its order. Freezing is always safe; it is what happens wherever two structures
cannot be brought together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Label = tuple["Axis | None", ...]
"""The axes of a tensor, one a dimension; None for a dimension of size 1, which has no order to keep."""


@dataclass(frozen=True)
class Lookup:
    """Row i of a tensor belongs to index `key[i]` of `axis`, as where each token looks up the weights of its expert."""

    axis: Axis
    key: object


@dataclass(eq=False, slots=True)
class Axis:
    """A node of the forest. Read all but `size` of roots (`find`) only."""

    size: int
    reason: str = ""  # why it is frozen; empty while it may move
    lookups: tuple[Lookup, ...] = ()
    kind: Literal["atom", "product", "concat"] = "atom"
    parts: list[Axis] = field(default_factory=list)
    parent: Axis | None = None


def find(axis: Axis) -> Axis:
    """The representative of the class, with path compression."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def freeze(axis: Axis | None, reason: str) -> None:
    """Forbid every permutation of the axis and of its parts. The first reason given is the one kept."""
    if axis is None:
        return
    root = find(axis)
    for part in root.parts:
        freeze(part, reason)
    if root.kind == "atom" and not root.reason:
        root.reason = reason


def product(parts: Iterable[Axis]) -> Axis:
    """The row-major product of axes; factors of size 1 are dropped."""
    return _compose("product", [part for part in parts if part.size != 1] or [Axis(1)])


def concat(parts: Iterable[Axis]) -> Axis:
    """The axes one after another."""
    return _compose("concat", list(parts))


def unify(first: Axis | None, second: Axis | None, reason: str) -> None:
    """State that two axes index the same thing. `reason` is given to what freezes if their structures do not
    fit."""
    if first is None or second is None:
        return
    a, b = find(first), find(second)
    if a is b:
        return
    if a.size != b.size:
        _freeze_all((a, b), reason)
        return
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        if a.reason:
            freeze(b, a.reason)
    elif not _unify_structures(a, b, reason):
        _freeze_all((a, b), reason)
        return
    a, b = find(a), find(b)
    if a is not b:
        lookups = tuple(dict.fromkeys(a.lookups + b.lookups))
        b.lookups, a.parent = lookups, b
        for one, other in itertools.combinations(lookups, 2):
            if one.key is other.key and one.axis.size == other.axis.size:
                unify(one.axis, other.axis, reason)


def align(left: Sequence[Axis], right: Sequence[Axis], reason: str) -> bool:
    """State that two products index the same thing, splitting factors where needed (a view does this).

    What cannot be split to fit is frozen, and False is returned.
    """
    a_side, b_side = list(left), list(right)
    while a_side and b_side:
        a, b = find(a_side.pop(0)), find(b_side.pop(0))
        if a.kind == "product" or b.kind == "product":
            a_side[:0] = a.parts if a.kind == "product" else [a]
            b_side[:0] = b.parts if b.kind == "product" else [b]
        elif a.size == b.size:
            unify(a, b, reason)
        elif a.size > b.size:
            if (halves := factor(a, b.size, reason)) is None:
                _freeze_all((a, b, *a_side, *b_side), reason)
                return False
            unify(halves[0], b, reason)
            a_side.insert(0, halves[1])
        else:
            a_side.insert(0, a)
            b_side.insert(0, b)
            a_side, b_side = b_side, a_side
    return True


def factor(axis: Axis, outer: int, reason: str) -> tuple[Axis, Axis] | None:
    """Split an axis into a product of an axis of size `outer` and the rest; None where its structure forbids
    it."""
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
    """Split an axis into a concatenation at the given inner points; None where its structure forbids it."""
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
    """One index of a nested loop over a dimension: `axis` (a root) runs in steps of `stride`."""

    axis: Axis
    stride: int


@dataclass(frozen=True)
class Occurrence:
    """Where an atom occurs along a dimension: at offset + stride * index + the sum of its siblings' loops."""

    atom: Axis
    stride: int
    offset: int
    siblings: tuple[Loop, ...]


def occurrences(axis: Axis, stride: int = 1, offset: int = 0, around: tuple[Loop, ...] = ()) -> Iterator[Occurrence]:
    """Every place where an atom occurs in the structure of an axis."""
    root = find(axis)
    if root.kind == "atom":
        yield Occurrence(root, stride, offset, around)
    elif root.kind == "concat":
        for part in root.parts:
            yield from occurrences(part, stride, offset, around)
            offset += stride * part.size
    else:
        strides = _strides(root.parts, stride)
        for position, part in enumerate(root.parts):
            siblings = tuple(
                loop
                for place, other in enumerate(root.parts)
                if place != position
                for loop in loops(other, strides[place])
            )
            yield from occurrences(part, strides[position], offset, around + siblings)


def loops(axis: Axis, stride: int = 1) -> tuple[Loop, ...]:
    """The factors of an axis as nested loops; a concatenation inside it is one loop over its whole length."""
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


def _freeze_all(axes: Iterable[Axis], reason: str) -> None:
    for axis in axes:
        freeze(axis, reason)


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
    bounds, position = [], 0
    for part in root.parts[:-1]:
        position += part.size
        bounds.append(position)
    return bounds


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
