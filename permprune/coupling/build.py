"""Build the channel spaces from a labelled graph: one for each atom along a linear's input dimension."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from permprune.coupling.axes import Axis, Label, Loop, Occurrence, find, freeze, loops, occurrences
from permprune.coupling.sites import common_prefix, dotted, owner, unique
from permprune.coupling.space import ChannelSpace, Freedom, Member, Role
from permprune.coupling.walk import Walk

Key = tuple[str, int]
"""A parameter and one of its dimensions."""

Places = Mapping[Key, Sequence[Occurrence]]
"""Where an atom occurs in the parameters."""


def build_spaces(walk: Walk, readers: Mapping[Key, str]) -> tuple[ChannelSpace, ...]:
    """Build a space for every atom that the input dimension of some linear contains.

    Spaces are sorted by the first linear that reads them; spaces in the same input dimension are sorted by stride, so
    the channels of a head come before the heads. `readers` maps (weight, input dimension) to the name of the `Site`
    that the linear reads.

    What the model returns beside its logits (`Walk.outputs`) keeps its order, except for channels that are read at
    several sites, such as the hidden states of the last layer: to keep them would cost the most important order.
    """
    places_of: dict[Axis, dict[Key, list[Occurrence]]] = {}
    for parameter, label in walk.parameters.items():
        for spot in occurrences(label):
            if spot.atom.size > 1:
                places_of.setdefault(spot.atom, {}).setdefault((parameter, spot.dim), []).append(spot)
    outputs = _outputs(walk, places_of, readers)
    blocks = _block_axes(walk, places_of)
    rank = {key: position for position, key in enumerate(walk.reads)}
    ranked = []
    for atom, places in places_of.items():
        reading = [(rank[key], spot.stride) for key, spots in places.items() if key in rank for spot in spots]
        if reading:
            ranked.append((min(reading), atom))
    ranked.sort(key=lambda entry: entry[0])
    taken: Counter[str] = Counter()
    spaces = []
    for _, atom in ranked:
        space = _space(walk, atom, places_of[atom], blocks[atom], readers)
        spaces.append(replace(space, name=unique(space.name, taken), outputs=tuple(outputs.get(atom, ()))))
    return tuple(spaces)


def _outputs(walk: Walk, places_of: Mapping[Axis, Places], readers: Mapping[Key, str]) -> dict[Axis, dict[str, None]]:
    """The names of the outputs beside the logits with channels of each atom; atoms read at one site are frozen."""
    names: dict[Axis, dict[str, None]] = {}
    for name, label in walk.outputs:
        for atom in (spot.atom for spot in occurrences(label) if spot.atom in places_of):
            sites = {readers[key] for key in places_of[atom] if key in readers}
            if len(sites) > 1 and not atom.reason:
                names.setdefault(atom, {})[name] = None
            else:
                freeze(atom, reason=f"the model returns it as {name}")
    return names


def _block_axes(walk: Walk, atoms: Iterable[Axis]) -> dict[Axis, list[Axis]]:
    """For each atom, the axes along which the atom may be permuted independently at every index.

    An axis qualifies if it accompanies every occurrence of the atom in parameters and activations: then no op combines
    elements of the atom from two different indices of that axis.
    """
    wanted = set(atoms)
    common: dict[Axis, dict[Axis, None]] = {}
    every = itertools.chain(walk.records, walk.parameters.values())
    labels = {tuple(0 if axis is None else id(find(axis)) for axis in label): label for label in every}
    for label in labels.values():
        for spot in occurrences(label):
            if spot.atom in wanted:
                beside = _companions(label, spot)
                common[spot.atom] = {axis: None for axis in common.get(spot.atom, beside) if axis in beside}
    return {atom: [] if atom.reason else list(common[atom]) for atom in wanted}


def _companions(label: Label, spot: Occurrence) -> dict[Axis, None]:
    """The atoms that accompany an occurrence: the other factors of its dimension, and the factors of other dimensions.

    An atom found twice is ambiguous and is left out.
    """
    same = [loop.axis for loop in spot.siblings]
    others = [
        loop.axis for dim, axis in enumerate(label) if axis is not None and dim != spot.dim for loop in loops(axis)
    ]
    once = [axis for axis in same if same.count(axis) == 1]
    once += [axis for axis in others if others.count(axis) == 1 and axis not in same]
    return {axis: None for axis in once if axis.kind == "atom" and axis is not spot.atom}


def _space(walk: Walk, atom: Axis, places: Places, blocks: Sequence[Axis], readers: Mapping[Key, str]) -> ChannelSpace:
    members = [one for key, spots in places.items() for one in _members(walk, key, spots, blocks, readers)]
    count = members[0].positions.shape[0]
    freedom: Freedom = "frozen" if atom.reason else "blocks" if count > 1 else "free"
    return ChannelSpace(_name(places, count, readers), atom.size, count, freedom, tuple(members), atom.reason)


def _members(
    walk: Walk, key: Key, spots: Sequence[Occurrence], blocks: Sequence[Axis], readers: Mapping[Key, str]
) -> list[Member]:
    """The members for one dimension of a parameter: one that holds all copies.

    There is one for each copy if they overlap, or involve different dimensions.
    """
    parameter, _ = key
    role: Role = "reads" if key in readers else "writes" if key in walk.writes else "scales"
    site = readers.get(key)
    placed = [_positions(walk.parameters[parameter], spot, blocks) for spot in spots]
    dims = {entry[0] for entry in placed}
    joined = torch.cat([positions for _, positions in placed], dim=1)
    if len(dims) == 1 and joined.unique().numel() == joined.numel():
        return [Member(parameter, placed[0][0], joined, role, site)]
    return [Member(parameter, where, positions, role, site) for where, positions in placed]


def _positions(label: Label, spot: Occurrence, blocks: Sequence[Axis]) -> tuple[tuple[int, ...], Tensor]:
    """`Member.dims` and `Member.positions`, (blocks, copies, size), of one occurrence."""
    beside = {loop.axis for loop in spot.siblings}
    elsewhere = [
        dim
        for dim, axis in enumerate(label)
        if axis is not None
        and dim != spot.dim
        and any(loop.axis in blocks and loop.axis not in beside for loop in loops(axis))
    ]
    dims = tuple(sorted([spot.dim, *elsewhere]))
    offset, stride, around = 0, 1, []
    for dim in reversed(dims):
        axis = label[dim]
        assert axis is not None
        if dim == spot.dim:
            offset = spot.offset * stride
            inner = spot.siblings
            atom_loop = Loop(spot.atom, spot.stride * stride)
        else:
            inner = loops(axis)
        around += [Loop(loop.axis, loop.stride * stride) for loop in inner]
        stride *= axis.size
    chosen = [next(loop for loop in around if loop.axis is block) for block in blocks]
    copies = sorted((loop for loop in around if loop not in chosen), key=lambda loop: -loop.stride)
    grid = _run(chosen)[:, None, None] + _run(copies)[None, :, None] + _run([atom_loop])[None, None, :]
    return dims, grid + offset


def _run(nested: Iterable[Loop]) -> Tensor:
    """The offsets that nested loops visit, in order; the last loop is the innermost."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for loop in nested:
        steps = torch.arange(loop.axis.size, dtype=torch.int64) * loop.stride
        offsets = (offsets[:, None] + steps).flatten()
    return offsets


def _name(places: Places, blocks: int, readers: Mapping[Key, str]) -> str:
    """The name of a space, prefixed with the common prefix of the modules that read it.

    "input" for channels read at one site, "residual" for channels read at several sites, and "heads" or
    "heads_in_group" for groups of channels (stride > 1), without and with several blocks.
    """
    reading = [key for key in places if key in readers]
    owners = {owner(parameter) for parameter, _ in reading}
    prefix = common_prefix(owners)
    if all(spot.stride == 1 for key in reading for spot in places[key]):
        return dotted(prefix, "input" if len({readers[key] for key in reading}) == 1 else "residual")
    parent = prefix.rpartition(".")[0] if len(owners) == 1 else prefix
    return dotted(parent, "heads" if blocks == 1 else "heads_in_group")
