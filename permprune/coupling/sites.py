"""Sites: which linears read the same tensor, and where a gather can reorder it without affecting other users."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Graph, Node

from permprune.coupling.space import Site
from permprune.coupling.walk import IDENTITIES, Walk, module_path, op_name, shape_of

_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze"})


@dataclass
class _Group:
    """Tensors that are read by the same weights, so that they have to share one permutation."""

    sources: list[Node] = field(default_factory=list)
    readings: set[tuple[Node, Node]] = field(default_factory=set)  # (tensor, linear)
    weights: dict[tuple[str, int], None] = field(default_factory=dict)


def find_sites(model: nn.Module, walk: Walk, graph: Graph) -> tuple[tuple[Site, ...], dict[tuple[str, int], str]]:
    """The sites in graph order, and a mapping from (weight, input dimension) to the name of the site it reads."""
    groups = _groups(walk)
    order = {node: position for position, node in enumerate(graph.nodes)}
    groups.sort(key=lambda group: min(order[node] for node in group.sources))
    exits = _module_exits(graph)
    names = UniqueNames()
    sites, readers = [], {}
    for group in groups:
        weights = sorted(group.weights, key=lambda key: min(order[linear] for _, linear in walk.reads[key]))
        module = _gather_module(model, group, exits)
        owners = [owner(parameter) for parameter, _ in weights]
        name = names.take(f"{module}.output" if module else dotted(common_prefix(owners), "input"))
        gather = ("output", module) if module else ("input",)
        parameters = tuple(dict.fromkeys(parameter for parameter, _ in weights))
        sites.append(Site(name, parameters, shape_of(group.sources[0])[-1], gather))
        readers.update(dict.fromkeys(weights, name))
    return tuple(sites), readers


class UniqueNames:
    """Makes names unique: `take` appends a number to a name that is already taken."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def take(self, name: str) -> str:
        """Return `name`, with a number appended if it is taken, and mark it as taken."""
        count = self._taken[name] = self._taken.get(name, 0) + 1
        return name if count == 1 else self.take(f"{name}.{count}")


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


def _groups(walk: Walk) -> list[_Group]:
    """Group the tensors that linears read: tensors read by the same weight are in the same group."""
    group_of: dict[Node, _Group] = {}
    for weight, readings in walk.reads.items():
        group = _Group()
        for tensor, linear in readings:
            source = _source(tensor)
            group.readings.add((source, linear))
            known = group_of.get(source)
            if known is None:
                group.sources.append(source)
            elif known is not group:
                group.sources += [node for node in known.sources if node not in group.sources]
                group.readings |= known.readings
                group.weights.update(known.weights)
            for node in group.sources:
                group_of[node] = group
        group.weights[weight] = None
    return list({id(group): group for group in group_of.values()}.values())


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


def _gather_module(model: nn.Module, group: _Group, exits: dict[str, set[Node]]) -> str:
    """The leaf module whose only output is the group's tensor, if only the group's linears use it; else empty."""
    path = module_path(group.sources[0])
    if not path or group.sources[0].op != "call_function":
        return ""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return ""
    alone = all((source, user) in group.readings for source in group.sources for _, user in _uses(source))
    leaf = next(module.children(), None) is None
    return path if alone and leaf and exits.get(path) == set(group.sources) else ""
