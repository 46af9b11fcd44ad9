"""Sites: which linears read the same tensor, and where a gather can reorder it without affecting other users."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from typing import TypeVar

from torch import nn
from torch.fx import Graph, Node

from permprune.coupling.space import Site
from permprune.coupling.walk import IDENTITIES, Walk, module_path, op_name, shape_of

W = TypeVar("W", bound=Hashable)
T = TypeVar("T", bound=Hashable)

_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze"})


def find_sites(model: nn.Module, walk: Walk, graph: Graph) -> tuple[tuple[Site, ...], dict[tuple[str, int], str]]:
    """The sites in graph order, and a mapping from (weight, input dimension) to the name of the site it reads."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    readings = [(key, _source(tensor), linear) for key, read in walk.reads.items() for tensor, linear in read]
    groups = connected((key, source) for key, source, _ in readings)
    groups.sort(key=lambda group: min(order[source] for _, source in group))
    exits = _module_exits(graph)
    names: Counter[str] = Counter()
    sites, readers = [], {}
    for group in groups:
        keys = {key for key, _ in group}
        weights = [key for key in walk.reads if key in keys]
        weights.sort(key=lambda key: min(order[linear] for _, linear in walk.reads[key]))
        uses = {(source, linear) for key, source, linear in readings if key in keys}
        module = _gather_module(model, uses, exits)
        owners = [owner(parameter) for parameter, _ in weights]
        name = unique(f"{module}.output" if module else dotted(common_prefix(owners), "input"), names)
        gather = ("output", module) if module else ("input",)
        parameters = tuple(dict.fromkeys(parameter for parameter, _ in weights))
        sites.append(Site(name, parameters, shape_of(group[0][1])[-1], gather))
        readers.update(dict.fromkeys(weights, name))
    return tuple(sites), readers


def connected(readings: Iterable[tuple[W, T]]) -> list[list[tuple[W, T]]]:
    """Group readings (weight, tensor): those of one weight or of one tensor have to share a permutation.

    Groups are in the order in which their last tensor occurs first.
    """
    read: dict[T, list[tuple[W, T]]] = {}
    for weight, tensor in readings:
        read.setdefault(tensor, []).append((weight, tensor))
    groups: list[list[tuple[W, T]]] = []
    for together in read.values():
        weights = {weight for weight, _ in together}
        joined, apart = list[list[tuple[W, T]]](), list[list[tuple[W, T]]]()
        for group in groups:
            (apart if weights.isdisjoint(weight for weight, _ in group) else joined).append(group)
        groups = [*apart, [*itertools.chain(*joined, together)]]
    return groups


def unique(name: str, taken: Counter[str]) -> str:
    """Return `name`, with a number appended if it is among those `taken`, and count it there."""
    taken[name] += 1
    return name if taken[name] == 1 else unique(f"{name}.{taken[name]}", taken)


def owner(parameter: str) -> str:
    """The name of the module that owns a weight; a parameter that is not named `weight` is returned unchanged."""
    return parameter.removesuffix(".weight")


def common_prefix(names: Iterable[str]) -> str:
    """The longest common prefix of dotted names, in whole components."""
    steps = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(here[0] for here in itertools.takewhile(lambda step: len(set(step)) == 1, steps))


def dotted(prefix: str, name: str) -> str:
    """Join a prefix, which may be empty, and a name with a dot."""
    return f"{prefix}.{name}" if prefix else name


def _source(tensor: Node) -> Node:
    """Follow a tensor back through ops that do not change its last dimension."""
    while _passes(tensor):
        tensor = tensor.args[0]  # type: ignore[assignment]
    return tensor


def _passes(node: Node) -> bool:
    """Whether a node only passes on its first argument, with the last dimension unchanged."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    name = op_name(node)
    if name in IDENTITIES or (name == "pointwise" and "clone" in str(node.target)):
        return True
    before, after = (shape_of(node.args[0]), shape_of(node)) if name in _VIEWS else ((), ())
    return bool(before) and bool(after) and before[-1] == after[-1]


def _uses(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (used node, user) for every use of a tensor, looking through nodes that only pass it on."""
    for user in node.users:
        if _passes(user):
            yield from _uses(user)
        elif user.op == "output" or user.meta.get("val") is not None:
            yield node, user


def _module_exits(graph: Graph) -> dict[str, set[Node]]:
    """For each module, the tensors computed inside it that are used outside it."""
    exits: dict[str, set[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _passes(node):
            path = module_path(node)
            if any(user.op == "output" or not _inside(user, path) for _, user in _uses(node)):
                exits.setdefault(path, set()).add(node)
    return exits


def _inside(node: Node, path: str) -> bool:
    here = module_path(node)
    return not path or here == path or here.startswith(f"{path}.")


def _gather_module(model: nn.Module, readings: Set[tuple[Node, Node]], exits: Mapping[str, set[Node]]) -> str:
    """The leaf module whose only output is the tensor of all readings, if nothing else uses it; else empty.

    The readings are (tensor, linear).
    """
    sources = {source for source, _ in readings}
    path = module_path(next(iter(sources)))
    if not path or exits.get(path) != sources:
        return ""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return ""
    alone = all((source, user) in readings for source in sources for _, user in _uses(source))
    return path if alone and next(module.children(), None) is None else ""
