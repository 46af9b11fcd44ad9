"""Coupling rules for arithmetic: elementwise ops, contractions, norms, reductions and constants.

Most of these ops commute with a permutation of channels: elementwise ops unify the axes of their operands, and the
result of a contraction or a symmetric reduction does not depend on the order of the axis it sums over.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from permprune.coupling.axes import Axis, factor, freeze, product, unify
from permprune.coupling.walk import (
    Walk,
    arguments,
    broadcast,
    coupling_rule,
    fresh,
    listed,
    lookups,
    moved_dims,
    place,
    replace,
    shape_of,
)


@coupling_rule("pointwise", "where", "__and__", "__or__", "__xor__", "copy_", "fill", "fill_", "zero_")
def _pointwise(walk: Walk, node: Node) -> Any:
    if not isinstance(node.meta.get("val"), Tensor):
        return NotImplemented
    inputs = [walk.label(source) for source in node.all_input_nodes]
    return broadcast(inputs, len(shape_of(node)), f"indices regrouped by {place(node)}")


@coupling_rule("linear")
def _linear(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    source, weight, bias = walk.label(bound["input"]), walk.label(bound["weight"]), walk.label(bound["bias"])
    if source is None or weight is None or len(weight) != 2:
        return NotImplemented
    unify(source[-1], weight[1], f"indices regrouped by {place(node)}")
    if bias is not None:
        unify(bias[-1], weight[0], f"indices regrouped by {place(node)}")
    walk.record(source, without=[-1])
    walk.record(weight, without=[1])
    walk.read(bound["weight"], 1, bound["input"], node)
    walk.write(bound["weight"], 0)
    return (*source[:-1], weight[0])


@coupling_rule("matmul", "mm", "bmm")
def _matmul(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    return _multiply(walk, node, bound["self"], bound["mat2" if "mat2" in bound else "other"])


@coupling_rule("addmm", "baddbmm")
def _addmm(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    first, second = ("mat1", "mat2") if "mat1" in bound else ("batch1", "batch2")
    result = _multiply(walk, node, bound[first], bound[second])
    return broadcast([result, walk.label(bound["self"])], len(result), f"indices regrouped by {place(node)}")


@coupling_rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped(walk: Walk, node: Node) -> Any:
    """Grouped matrix product of `source` (rows, k) and `weight` (groups, k, n) with result (rows, n).

    Each group of consecutive rows, which ends at an entry of `ends`, is multiplied by one matrix of `weight`.
    """
    source, weight, ends, *rest = arguments(node).values()
    a, b = walk.label(source), walk.label(weight)
    if a is None or b is None or len(a) != 2 or len(b) != 3 or rest != [None] * len(rest):
        return NotImplemented
    reason = f"rows are looked up by {place(node)}"
    freeze(b[0], reason=reason)
    if a[0]:
        unify(a[0], Axis(a[0].size, reason, lookups(b[0], cast(Node, ends))), reason)
    unify(a[1], b[1], reason)
    walk.record(a, without=[-1])
    walk.record(b, without=[-2])
    walk.read(weight, -2, cast(Node, source), node)
    walk.write(weight, -1)
    return (a[0], b[2])


@coupling_rule("scaled_dot_product_attention")
def _attention(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    query, key, value = (walk.label(bound[name]) or () for name in ("query", "key", "value"))
    mask, reason = walk.label(bound["attn_mask"]), f"indices regrouped by {place(node)}"
    heads, shared = shape_of(bound["query"])[:-2], shape_of(bound["key"])[:-2]
    if bound["enable_gqa"] and heads[-1] != shared[-1]:
        tied = [*(axis for axis in key[-3:-2] if axis), Axis(heads[-1] // shared[-1])]
        unify(query[-3], product(tied), reason)
        unify(key[-3], value[-3], reason)
        batch = broadcast([key[:-3], value[:-3], query[:-3]], len(heads) - 1, reason) + query[-3:-2]
    else:
        batch = broadcast([query[:-2], key[:-2], value[:-2]], len(heads), reason)
    unify(query[-1], key[-1], reason)
    unify(key[-2], value[-2], reason)
    scores = (*batch, query[-2], key[-2])
    if mask is not None:
        broadcast([scores, mask], len(scores), reason)
    if bound["is_causal"]:
        freeze(query[-2], key[-2], reason=f"order matters to {place(node)}")
    for operand in (query, key):
        walk.record(operand, without=[-1])
    for operand in (key, value):
        walk.record(operand, without=[-2])
    walk.record(scores, without=[-1])
    return (*batch, query[-2], value[-1])


@coupling_rule("embedding")
def _embedding(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    weight, indices = walk.label(bound["weight"]) or (), walk.label(bound["indices"]) or ()
    freeze(weight[0], reason=f"rows are looked up by {place(node)}")
    walk.write(bound["weight"], 1)
    return (*indices, weight[1])


@coupling_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    source, weight, bias = walk.label(bound["input"]) or (), walk.label(bound["weight"]) or (), bound["bias"]
    if bound.get("transposed") or len(source) != len(weight):
        return NotImplemented
    reason, regrouped = f"order matters to {place(node)}", f"indices regrouped by {place(node)}"
    freeze(*source[2:], *weight[2:], reason=reason)
    (group,) = fresh([bound["groups"]])
    unify(_in_group(source[1], group, regrouped), weight[1], regrouped)
    _in_group(weight[0], group, regrouped)
    unify(weight[0], (walk.label(bias) or (None,))[0], regrouped)
    walk.record((source[0], group, *source[2:]))
    walk.record(weight, without=[1])
    walk.write(bound["weight"], 0)
    return (source[0], weight[0], *fresh(shape_of(node)[2:], reason))


def _in_group(channels: Axis | None, group: Axis | None, reason: str) -> Axis | None:
    """Split a channel axis into groups and return the axis within a group (None if its size is 1).

    `group` is the axis over groups. If the channel axis cannot be split, both are frozen and a new frozen axis is
    returned.
    """
    if channels is None or group is None:
        return channels
    halves = (channels, None) if channels.size == group.size else factor(channels, group.size, reason)
    if halves is None:
        freeze(channels, group, reason=reason)
        return Axis(channels.size // group.size, reason)
    unify(halves[0], group, reason)
    return halves[1]


@coupling_rule("_weight_norm")
def _weight_norm(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, scale = walk.label(bound["v"]) or (), walk.label(bound["g"])
    walk.record(label, without=[dim for dim in range(len(label)) if dim != bound["dim"] % len(label)])
    if origin := walk.origins.get(bound["v"]):
        walk.origins[node] = origin
    return broadcast([label, scale], len(label), f"indices regrouped by {place(node)}")


@coupling_rule("layer_norm", "rms_norm")
def _norm(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["input"]) or ()
    count = len(bound["normalized_shape"])
    affine = [walk.label(bound[name]) for name in ("weight", "bias") if name in bound]
    walk.record(label, without=range(-count, 0))
    return broadcast([label, *affine], len(label), f"indices regrouped by {place(node)}")


@coupling_rule("group_norm")
def _group_norm(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label, reason = walk.label(bound["input"]) or (), f"indices regrouped by {place(node)}"
    for name in ("weight", "bias"):
        unify(label[1], (walk.label(bound[name]) or (None,))[0], reason)
    (group,) = fresh([bound["num_groups"]])
    _in_group(label[1], group, reason)
    walk.record((label[0], group))
    return label


@coupling_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"])
    walk.record(label, without=[bound["dim"]] if label else ())
    return label


@coupling_rule(
    "sum", "mean", "amax", "amin", "prod", "all", "any", "var", "std", "logsumexp", "linalg_vector_norm", "norm"
)
def _reduce(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    label = walk.label(bound["self"]) or ()
    dims = listed(bound.get("dim"), len(label)) or list(range(len(label)))
    if not bound.get("keepdim", False):
        return tuple(axis for dim, axis in enumerate(label) if dim not in dims)
    return tuple(None if dim in dims else axis for dim, axis in enumerate(label))


@coupling_rule("max", "min")
def _extreme(walk: Walk, node: Node) -> Any:
    bound = arguments(node)
    if "dim" not in bound:
        return NotImplemented
    label, dim = walk.label(bound["self"]) or (), bound["dim"]
    if any(user.args[1:] != (0,) for user in node.users):
        freeze(label[dim], reason=f"order matters to {place(node)}")
    kept = replace(label, dim, None)
    if not bound["keepdim"]:
        kept = kept[: dim % len(label)] + kept[dim % len(label) + 1 :]
    return [kept, kept]


@coupling_rule(
    "full",
    "full_like",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "new_full",
    "new_zeros",
    "new_ones",
    "empty",
    "empty_like",
    "new_empty",
    "scalar_tensor",
)
def _uniform(walk: Walk, node: Node) -> Any:
    return fresh(shape_of(node))  # all elements are equal, so they may be permuted freely


@coupling_rule("arange", "linspace", "eye")
def _sequence(walk: Walk, node: Node) -> Any:
    return fresh(shape_of(node), f"constant made by {place(node)}")


def _multiply(walk: Walk, node: Node, first: Node, second: Node) -> Any:
    a, b = walk.label(first), walk.label(second)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return NotImplemented
    reason = f"indices regrouped by {place(node)}"
    batch = broadcast([a[:-2], b[:-2]], max(len(a), len(b)) - 2, reason)
    unify(a[-1], b[-2], reason)
    walk.record(a, without=[-1])
    walk.record(b, without=[-2])
    walk.read(second, -2, first, node)
    walk.write(second, -1)
    if b[-1] is None and (column := _column(second)):  # matrix-vector product: the weight is the first operand
        walk.read(first, -1, column, node)
        walk.write(first, -2)
    return (*batch, a[-2], b[-1])


def _column(node: Node) -> Node | None:
    """The tensor to which `node` adds a last dimension of size 1; None if it does anything else."""
    last = moved_dims(node)
    return cast(Node, node.args[0]) if last and last[-1] is None and last[:-1] == list(range(len(last) - 1)) else None
