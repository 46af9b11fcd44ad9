"""Walk over a traced graph and label the dimensions of every tensor with axes, with one rule per op.

A rule is a function of the walk and a node. It unifies, splits or freezes the axes of the node's inputs and returns
the label of the output: a list of labels for an op with several outputs, or NotImplemented for a case that the rule
does not cover. An op without a rule, or not covered by its rule, freezes all axes of its inputs, which is always safe.
Supporting a new family of models takes new rules and nothing else.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from permprune.coupling.axes import Axis, Label, Lookup, cut, find, freeze, unify

T = TypeVar("T")

Rule = Callable[["Walk", Node], Any]

RULES: dict[str, Rule] = {}
"""The rules by the name of the op (see `op_name`)."""

IDENTITIES = frozenset({"alias", "contiguous", "detach", "dropout", "lift_fresh_copy", "to", "type_as", "_to_copy"})
"""Ops whose result has the shape and, up to dtype and dropout, the values of their first argument."""

MOVES = frozenset(
    {"transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "adjoint", "mT", "unsqueeze", "squeeze"}
)
"""Ops that only move dimensions (`moved_dims`)."""

VIEWS = frozenset({"view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"})
"""Ops that only regroup the indices of their first argument."""

_WITHOUT_VALUE = re.compile(r"_assert_\w+|sym_\w+|_check\w*")


def coupling_rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator that registers a rule for the ops with these names (see `op_name`)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True)
class ParameterView:
    """The parameter that a tensor is a view of, possibly transposed or indexed.

    `dims[d]` is the dimension of the parameter that dimension d of the tensor comes from; None if there is none, as for
    rows that were looked up.
    """

    parameter: str
    dims: tuple[int | None, ...]


class Composite(ABC):
    """Takes the place of a label for a tensor that needs several labels."""

    labels: tuple[Label, ...]

    @abstractmethod
    def step(self, walk: Walk, node: Node) -> Any:
        """Label a node whose first argument has this composite label."""


@dataclass
class Walk:
    """The state of the walk: everything known about the graph so far.

    `labels` maps nodes to labels, `constants` maps constant nodes to their values, and `parameters` maps parameter
    names to labels. `origins` maps nodes that are views of a parameter to their `ParameterView`. `records` lists every
    label seen, including those of partial results inside an op (a contraction sums over the contracted axis, so its
    partial result lacks it). `reads` maps (weight, input dimension) of each linear to its (activation, linear) nodes,
    and `writes` holds the (weight, output dimension) of linears, convolutions and embeddings. `outputs` are the names
    and labels of what the model returns beside its logits.
    """

    labels: dict[Node, Any] = field(default_factory=dict)
    constants: dict[Node, Tensor] = field(default_factory=dict)
    parameters: dict[str, Label] = field(default_factory=dict)
    origins: dict[Node, ParameterView] = field(default_factory=dict)
    records: list[Label] = field(default_factory=list)
    reads: dict[tuple[str, int], list[tuple[Node, Node]]] = field(default_factory=dict)
    writes: set[tuple[str, int]] = field(default_factory=set)
    outputs: list[tuple[str, Label]] = field(default_factory=list)

    def step(self, node: Node) -> None:
        """Label one `call_function` node."""
        name = op_name(node)
        known = RULES.get(name)
        if name == "getitem":
            parts = self.labels.get(node.args[0])  # type: ignore[arg-type]
            label = parts[cast(int, node.args[1])] if isinstance(parts, list) else None
        elif _WITHOUT_VALUE.fullmatch(name):
            label = None
        elif node.all_input_nodes and isinstance(first := self.labels.get(node.all_input_nodes[0]), Composite):
            label = first.step(self, node)
        else:
            label = known(self, node) if known else NotImplemented
        self.keep(node, self.give_up(node) if label is NotImplemented else label)
        for source in node.all_input_nodes:  # record again: the op may have added lookups to the inputs' axes
            for one in labels_in(self.labels.get(source)):
                if any(axis and find(axis).lookups for axis in one):
                    self.record(one)

    def keep(self, node: Node, label: Any) -> None:
        """Store and record the label of a node."""
        self.labels[node] = label
        for one in labels_in(label):
            self.record(one)

    def record(self, label: Label | None, without: Sequence[int] = ()) -> None:
        """Record that a tensor with this label, minus the dimensions `without`, occurs in the computation."""
        if label:
            dropped = {dim % len(label) for dim in without}
            kept = tuple(axis for dim, axis in enumerate(label) if dim not in dropped)
            self.records.append(kept + looked_up(kept))

    def give_up(self, node: Node) -> Any:
        """Label an op without a rule: freeze all axes of its inputs and return new, frozen axes for its outputs."""
        reason = f"no rule for {place(node)}"
        for source in node.all_input_nodes:
            for one in labels_in(self.labels.get(source)):
                freeze(*one, reason=reason)
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return fresh(value.shape, reason)
        if isinstance(value, (list, tuple)):
            return [fresh(item.shape, reason) if isinstance(item, Tensor) else None for item in value]
        return None

    def label(self, value: Any) -> Label | None:
        """The label of an op's argument; None if it is not a single tensor."""
        label = self.labels.get(value) if isinstance(value, Node) else None
        return label if isinstance(label, tuple) else None

    def read(self, weight: Any, dim: int, source: Node, reader: Node) -> None:
        """Record that `reader` contracts dimension `dim` of a weight with the last dimension of `source`."""
        if (place := self._behind(weight, dim)) is not None:
            self.reads.setdefault(place, []).append((source, reader))

    def write(self, weight: Any, dim: int) -> None:
        """Record that dimension `dim` of a weight is its output dimension."""
        if (place := self._behind(weight, dim)) is not None:
            self.writes.add(place)

    def _behind(self, weight: Any, dim: int) -> tuple[str, int] | None:
        """The parameter, and its dimension, that dimension `dim` of a weight node comes from; None if there is none."""
        origin = self.origins.get(weight) if isinstance(weight, Node) else None
        behind = origin.dims[dim] if origin else None
        return None if origin is None or behind is None else (origin.parameter, behind)


def labels_in(label: Any) -> Sequence[Label]:
    """The labels of a node as a sequence: none, one, or several for an op with several outputs."""
    if isinstance(label, Composite):
        return label.labels
    return [one for one in (label if isinstance(label, list) else [label]) if one]


def looked_up(label: Label) -> Label:
    """The axes that the rows of a tensor were looked up from (see `Lookup`).

    They accompany the tensor although none of its dimensions has them. An axis looked up by several keys is left out.
    """
    keys: dict[Axis, set[int]] = {}
    for axis in label:
        for lookup in find(axis).lookups if axis else ():
            keys.setdefault(find(lookup.axis), set()).add(id(lookup.key))
    return tuple(axis for axis, ids in keys.items() if len(ids) == 1)


def fresh(shape: Sequence[int], reason: str = "") -> Label:
    """New axes for a tensor of this shape, frozen if a reason is given."""
    return tuple(None if size == 1 else Axis(size, reason) for size in map(_static, shape))


def shape_of(node: Any) -> tuple[int, ...]:
    """The traced shape of a node; data-dependent sizes are replaced by numbers (see `_static`)."""
    return tuple(_static(size) for size in node.meta["val"].shape)


def shapes_of(node: Node) -> list[tuple[int, ...]]:
    """The traced shapes of the outputs of a node with several outputs."""
    return [tuple(_static(size) for size in value.shape) for value in node.meta["val"]]


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen op by their names in its schema, including defaults."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def op_name(node: Node) -> str:
    """The name of an ATen op without its overload, e.g. "linear"; "pointwise" for every op that PyTorch tags so."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    if torch.Tag.pointwise in target.tags:
        return "pointwise"
    return target._schema.name.removeprefix("aten::")


def writes(node: Node) -> bool:
    """Whether a node is an op that writes into one of its arguments, such as an in-place op."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def lookups(axis: Axis | None, key: Node) -> tuple[Lookup, ...]:
    """The `Lookup` of rows looked up along an axis by a key; empty if the key is overwritten anywhere in the graph."""
    source = key
    while _is_view(source):
        source = source.all_input_nodes[0]
    return (Lookup(axis, key),) if axis and not _overwritten(source) else ()


def _overwritten(node: Node) -> bool:
    return any(writes(user) or (_is_view(user) and _overwritten(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    """Whether the result of a node may share memory with its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def moved_dims(node: Node) -> list[int | None] | None:
    """For an op that only moves dimensions: the dimension of its first argument that each output dimension comes from.

    The entry of a new dimension is None. Returns None for every other op.
    """
    name = op_name(node)
    if name not in MOVES | IDENTITIES | {"slice"}:
        return None
    bound, rank = arguments(node), len(shape_of(node.args[0]))
    order: list[int | None] = list(range(rank))
    if name == "permute":
        return [dim % rank for dim in bound["dims"]]
    if name == "movedim":
        sources, targets = listed(bound["source"], rank), listed(bound["destination"], rank)
        rest = iter([dim for dim in order if dim not in sources])
        return [sources[targets.index(dim)] if dim in targets else next(rest) for dim in range(rank)]
    if name == "unsqueeze":
        order.insert(bound["dim"] % (rank + 1), None)
    elif name == "squeeze":
        chosen = listed(bound.get("dim"), rank) or range(rank)
        return [dim for dim in range(rank) if dim not in chosen or shape_of(node.args[0])[dim] != 1]
    elif name == "slice":
        return order if shape_of(node) == shape_of(node.args[0]) else None
    elif name == "numpy_T":
        order.reverse()
    elif name not in IDENTITIES and rank > 1:
        a, b = bound.get("dim0", bound.get("axis0", -2)), bound.get("dim1", bound.get("axis1", -1))
        order[a], order[b] = order[b], order[a]
    return order


def module_path(node: Node) -> str:
    """The name of the innermost module whose forward ran the node; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def place(node: Node) -> str:
    """The op and its location for messages, e.g. "cumsum in model.layers.0.mlp (modeling_x.py:12)"."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else node.name
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [(file, line) for file, line in frames if "/torch/" not in file] or frames
    source = f" ({PurePath(frames[-1][0]).name}:{frames[-1][1]})" if frames else ""
    return f"{name} in {module_path(node) or 'the model'}{source}"


def segments(axis: Axis | None, sizes: Sequence[int], reason: str) -> list[Axis | None]:
    """Cut an axis into consecutive pieces, None for those of size 1.

    If its structure does not allow it, the axis is frozen, and the pieces are new frozen axes.
    """
    points = list(itertools.accumulate([size for size in sizes if size][:-1]))
    pieces = cut(axis, points) if axis is not None and axis.size == sum(sizes) else None
    if pieces is None:
        freeze(axis, reason=reason)
        return list(fresh(sizes, reason))
    remaining = iter([None if piece.size == 1 else piece for piece in pieces])
    return [next(remaining) if size else Axis(0, reason) for size in sizes]


def replace(label: tuple[T, ...], dim: int, axis: T) -> tuple[T, ...]:
    """The label with the axis at `dim` replaced."""
    dim %= len(label)
    return (*label[:dim], axis, *label[dim + 1 :])


def reordered(label: tuple[T | None, ...], order: Sequence[int | None]) -> tuple[T | None, ...]:
    """The label of a tensor whose dimensions are moved (`moved_dims`)."""
    return tuple(None if dim is None else label[dim] for dim in order)


def listed(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """An op's `dim` argument as a list of non-negative dimensions; empty if it is None."""
    return [dim % rank for dim in ([] if dims is None else [dims] if isinstance(dims, int) else dims)]


def broadcast(labels: Sequence[Label | None], rank: int, reason: str) -> Label:
    """Unify labels under broadcasting (aligned at their last dimensions) and return the label of the result."""
    result: list[Axis | None] = [None] * rank
    for label in labels:
        for back in range(1, len(label or ()) + 1):
            axis = label[-back] if label else None
            if result[-back] is None:
                result[-back] = axis
            else:
                unify(result[-back], axis, reason)
    return tuple(result)


def _static(size: Any) -> int:
    """A size as an int.

    Each data-dependent size (a symbol) is replaced by a distinct number with many divisors, so that sizes derived from
    it by products and quotients stay integers and distinct.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    numbers = {symbol: re.sub(r"\D", "", symbol.name) for symbol in expression.free_symbols}
    primes = {symbol: sympy.prime(100 + int(number or 0)) for symbol, number in numbers.items()}
    return int(expression.subs({symbol: 720720 * prime for symbol, prime in primes.items()}))
