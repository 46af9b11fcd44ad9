"""Coupling rules for ops that move, split or join dimensions, and for ops whose result depends on the index order."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch.fx import Node

from permprune.coupling.axes import Axis, Label, align, concat, factor, freeze, product, unify
from permprune.coupling.stack import stacked
from permprune.coupling.walk import (
    IDENTITIES,
    MOVES,
    VIEWS,
    ParameterView,
    Walk,
    arguments,
    broadcast,
    coupling_rule,
    fresh,
    listed,
    lookups,
    moved_dims,
    op_name,
    place,
    reordered,
    replace,
    segments,
    shape_of,
    shapes_of,
)


@coupling_rule(*IDENTITIES)
def _identity(walk: Walk, node: Node) -> Any:
    source: Any = node.args[0]
    if source in walk.origins:
        walk.origins[node] = walk.origins[source]
    return walk.label(source)


@coupling_rule(*VIEWS)
def _view(walk: Walk, node: Node) -> Any:
    source: Any = node.args[0]
    label, shape = walk.label(source) or (), shape_of(node)
    if 0 in shape or math.prod(shape) != math.prod(shape_of(source)):
        return NotImplemented
    if stack := stacked(walk, node, label):
        return stack
    result = fresh(shape)
    align(label, result, f"indices regrouped by {place(node)}")
    return result


@coupling_rule(*MOVES)
def _move(walk: Walk, node: Node) -> Any:
    source: Any = node.args[0]
    label, order = walk.label(source) or (), moved_dims(node) or []
    if origin := walk.origins.get(source):
        walk.origins[node] = ParameterView(origin.parameter, reordered(origin.dims, order))
    return reordered(label, order)


@coupling_rule("expand", "expand_as", "broadcast_to")
def _expand(walk: Walk, node: Node) -> Any:
    # All values along an expanded dimension are equal, so its new axis may be permuted freely.
    label, shape = walk.label(node.args[0]) or (), shape_of(node)
    padded = (None,) * (len(shape) - len(label)) + label
    return tuple(old or new for old, new in zip(padded, fresh(shape), strict=True))


@coupling_rule("repeat")
def _repeat(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    if not all(isinstance(times, int) for times in bound["repeats"]):
        return NotImplemented
    padded = (None,) * (len(bound["repeats"]) - len(label)) + label
    return tuple(_replicas(old, times, False) for old, times in zip(padded, bound["repeats"], strict=True))


@coupling_rule("repeat_interleave")
def _repeat_interleave(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, times, dim = walk.label(bound.get("self")), bound.get("repeats"), bound.get("dim")
    if label is None or dim is None or not isinstance(times, int):
        return NotImplemented
    return replace(label, dim, _replicas(label[dim], times, True))


@coupling_rule("slice")
def _slice(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    dim, size = bound["dim"], shape_of(bound["self"])[bound["dim"]]
    ends = slice(bound["start"], bound["end"], bound["step"])
    known = all(isinstance(end, (int, type(None))) for end in (ends.start, ends.stop))
    start, stop, step = ends.indices(size) if known else (0, 0, 0)
    if step > 1 and (every := _every(label[dim], start, stop, step, f"indices picked by {place(node)}")):
        return replace(label, dim, every)
    if step != 1:
        return _reorder(label, [dim], shape_of(node), f"indices picked by {place(node)}")
    return replace(label, dim, _piece(label[dim], start, stop - start, size, node))


@coupling_rule("narrow")
def _narrow(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    if not isinstance(bound["start"], int):
        return NotImplemented
    label = walk.label(bound["self"]) or ()
    dim, size = bound["dim"], shape_of(bound["self"])[bound["dim"]]
    return replace(label, dim, _piece(label[dim], bound["start"] % size, bound["length"], size, node))


@coupling_rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, dim = walk.label(bound["self"]) or (), bound["dim"]
    sizes = [shape[dim] for shape in shapes_of(node)]
    if len(sizes) == 1:
        return [label]
    return [replace(label, dim, piece) for piece in segments(label[dim], sizes, f"cut by {place(node)}")]


@coupling_rule("glu")
def _glu(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, dim = walk.label(bound["self"]) or (), bound["dim"]
    size = shape_of(node)[dim]
    first, second = segments(label[dim], [size, size], f"cut by {place(node)}")
    unify(first, second, f"halves joined by {place(node)}")
    return replace(label, dim, first)


@coupling_rule("select", "unbind")
def _select(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    dim = bound["dim"] % len(label)
    freeze(label[dim], reason=f"one index picked by {place(node)}")
    rest = label[:dim] + label[dim + 1 :]
    if isinstance(node.meta["val"], (list, tuple)):
        return [rest] * len(node.meta["val"])
    if origin := walk.origins.get(bound["self"]):
        walk.origins[node] = ParameterView(origin.parameter, origin.dims[:dim] + origin.dims[dim + 1 :])
    return rest


@coupling_rule("cat", "concat", "concatenate")
def _cat(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    shape = shape_of(node)
    dim = bound["dim"] % len(shape)
    tensors = [tensor for tensor in bound["tensors"] if 0 not in shape_of(tensor)]
    if not tensors:
        return NotImplemented
    labels = [walk.label(tensor) or () for tensor in tensors]
    joined = labels[0][dim] if len(labels) == 1 else concat(label[dim] for label in labels)
    rest = broadcast([replace(label, dim, None) for label in labels], len(shape), f"joined by {place(node)}")
    return replace(rest, dim, joined)


@coupling_rule("stack")
def _stack(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    shape, reason = shape_of(node), f"stacked by {place(node)}"
    dim = bound["dim"] % len(shape)
    rest = broadcast([walk.label(tensor) for tensor in bound["tensors"]], len(shape) - 1, reason)
    return (*rest[:dim], fresh(shape[dim : dim + 1], reason)[0], *rest[dim:])


@coupling_rule(
    "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "argsort", "topk", "argmax", "argmin", "index_select"
)
def _ordered(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    dims = bound.get("dims", bound.get("dim"))
    if not label or dims is None or dims == [] or ("index" in bound and bound["index"] is None):
        return NotImplemented
    reason = f"order matters to {place(node)}"
    freeze(*(walk.label(bound.get("index")) or ()), reason=reason)
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return [_reorder(label, listed(dims, len(label)), shape, reason) for shape in shapes_of(node)]
    return _reorder(label, listed(dims, len(label)), shape_of(node), reason)


@coupling_rule(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "max_pool1d",
    "max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)
def _pool(walk: Walk, node: Node) -> Any:
    label, reason = walk.label(node.args[0]) or (), f"order matters to {place(node)}"
    count = int(op_name(node)[-2])  # the last `count` dimensions are pooled: 2 for avg_pool2d
    return _reorder(label, list(range(-count, 0)), shape_of(node), reason)


@coupling_rule("masked_scatter")
def _masked_scatter(walk: Walk, node: Node) -> Any:
    """Supported if the mask is constant along the last dimension, so that whole rows are replaced, in order."""
    bound = arguments(node)
    label, source = walk.label(bound["self"]) or (), walk.label(bound["source"]) or ()
    whole = shape_of(bound["source"])[-1:] == shape_of(node)[-1:] and _of_rows(walk, bound["mask"])
    if not whole or shape_of(bound["self"]) != shape_of(node):
        return NotImplemented
    reason = f"order matters to {place(node)}"
    unify(label[-1], source[-1], reason)
    freeze(*label[:-1], *source[:-1], reason=reason)
    return label


def _of_rows(walk: Walk, mask: Node) -> bool:
    """Whether a mask is constant along its last dimension."""
    while mask not in walk.constants and op_name(mask) in (*IDENTITIES, "expand", "expand_as"):
        if shape_of(mask)[-1] != shape_of(mask.args[0])[-1]:
            return True
        mask = cast(Node, mask.args[0])
    value = walk.constants.get(mask)
    return shape_of(mask)[-1] == 1 if value is None else bool((value == value[..., :1]).all())


@coupling_rule("gather")
def _gather(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, index = walk.label(bound["self"]) or (), walk.label(bound["index"]) or ()
    reason = f"order matters to {place(node)}"
    for dim, (axis, index_axis) in enumerate(zip(label, index, strict=True)):
        if dim == bound["dim"] % len(label) or axis is None or index_axis is None:
            freeze(axis, reason=reason)
        else:
            unify(axis, index_axis, reason)
    return index


@coupling_rule("tril", "triu")
def _triangle(walk: Walk, node: Node) -> Any:
    label = walk.label(node.args[0]) or ()
    freeze(*label[-2:], reason=f"order matters to {place(node)}")
    return label


@coupling_rule("pad", "constant_pad_nd")
def _pad(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    padded = [-1 - back for back in range(len(bound["pad"]) // 2) if any(bound["pad"][2 * back : 2 * back + 2])]
    return _reorder(label, padded, shape_of(node), f"padded by {place(node)}")


@coupling_rule("index")
def _index(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, indexed = walk.label(bound["self"]) or (), _indexed(walk, node)
    if indexed is None:
        return NotImplemented
    shape, reason = shape_of(node), f"indexed by {place(node)}"
    after = len(label) - indexed[-1] - 1
    middle = fresh(shape[indexed[0] : len(shape) - after], reason)
    if len(indexed) == len(middle) == 1:
        (dim,), (rows,) = indexed, middle
        if rows:
            rows.lookups = lookups(label[dim], bound["indices"][dim])
        if origin := walk.origins.get(bound["self"]):
            walk.origins[node] = ParameterView(origin.parameter, replace(origin.dims, dim, None))
    return (*label[: indexed[0]], *middle, *label[indexed[-1] + 1 :])


@coupling_rule("index_put", "index_put_")
def _index_put(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, indexed = walk.label(bound["self"]) or (), _indexed(walk, node)
    if indexed is None:
        return NotImplemented
    reason = f"indexed by {place(node)}"
    rank = max(len(shape_of(bound["indices"][dim])) for dim in indexed)
    written = (*label[: indexed[0]], *[Axis(0, reason)] * rank, *label[indexed[-1] + 1 :])
    broadcast([written, walk.label(bound["values"])], len(written), reason)
    return label


def _indexed(walk: Walk, node: Node) -> list[int] | None:
    """Freeze the dimensions that an op indexes, and its indices; None if they are masks, or not next to each other."""
    bound = arguments(node)
    indexed = [dim for dim, index in enumerate(bound["indices"]) if index is not None]
    if indexed != list(range(indexed[0], indexed[0] + len(indexed))):
        return None
    if any(bound["indices"][dim].meta["val"].dtype in (torch.bool, torch.uint8) for dim in indexed):
        return None
    label = walk.label(bound["self"]) or ()
    for axes in (label[indexed[0] : indexed[-1] + 1], *(walk.label(bound["indices"][dim]) or () for dim in indexed)):
        freeze(*axes, reason=f"indexed by {place(node)}")
    return indexed


def _replicas(axis: Axis | None, times: int, inside: bool) -> Axis | None:
    if times == 1:
        return axis
    copies = Axis(times)
    if axis is None:
        return copies
    return product([axis, copies] if inside else [copies, axis])


def _piece(axis: Axis | None, start: int, length: int, size: int, node: Node) -> Axis | None:
    if length == size:
        return axis
    reason = f"cut by {place(node)}"
    if length < 1:
        return Axis(0, reason)
    sizes = [start, length, size - start - length]
    return segments(axis, sizes, reason)[1]


def _every(axis: Axis | None, start: int, stop: int, step: int, reason: str) -> Axis | None:
    """The axis of the slice start:stop:step, if it takes one index from each group of `step` consecutive indices.

    Returns None otherwise, and if the axis cannot be split into such groups.
    """
    if axis is None or axis.size % step or start >= step or stop != axis.size or axis.size == step:
        return None
    halves = factor(axis, axis.size // step, reason)
    if halves is None:
        return None
    freeze(halves[1], reason=reason)
    return halves[0]


def _reorder(label: Label, dims: list[int], shape: Any, reason: str) -> Label:
    """The label of the result of an op that depends on the order of `dims`.

    Freezes the axes of `dims` and replaces them by new, frozen axes; they are dropped if the op removes dimensions.
    """
    chosen = {dim % len(label) for dim in dims}
    freeze(*(label[dim] for dim in chosen), reason=reason)
    if len(shape) < len(label):
        return tuple(axis for dim, axis in enumerate(label) if dim not in chosen)
    new = fresh(shape, reason)
    return tuple(new[dim] if dim in chosen else axis for dim, axis in enumerate(label))
