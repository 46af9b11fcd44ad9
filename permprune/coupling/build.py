"""Build the channel spaces from a labelled graph: one for each atom along a linear's input dimension."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permprune.coupling.axes import Axis, Label, Loop, Occurrence, find, freeze, loops, occurrences
from permprune.coupling.sites import UniqueNames, common_prefix, dotted, owner
from permprune.coupling.space import ChannelSpace, Member, Role
from permprune.coupling.walk import Walk


@dataclass(frozen=True)
class _Spot:
    """An occurrence of an atom in dimension `dim` of a tensor."""

    dim: int
    occurrence: Occurrence


def build_spaces(walk: Walk, readers: Mapping[tuple[str, int], str]) -> tuple[ChannelSpace, ...]:
    """Build a space for every atom that the input dimension of some linear contains.

    Spaces are sorted by the first linear that reads them; spaces in the same input dimension are sorted by stride, so
    the channels of a head come before the heads. `readers` maps (weight, input dimension) to the name of the `Site`
    that the linear reads.

    What the model returns beside its logits (`Walk.outputs`) keeps its order, except for channels that are read at
    several sites, such as the hidden states of the last layer: to keep them would cost the most important order.
    """
    spots = _parameter_spots(walk)
    outputs = _outputs(walk, spots, readers)
    blocks = _block_axes(walk, spots)
    rank = {key: position for position, key in enumerate(walk.reads)}
    ranked = []
    for atom, places in spots.items():
        reading = [
            (rank[parameter, spot.dim], spot.occurrence.stride)
            for parameter, spot in places
            if (parameter, spot.dim) in rank
        ]
        if reading:
            ranked.append((min(reading), atom))
    ranked.sort(key=lambda entry: entry[0])
    names = UniqueNames()
    return tuple(
        replace(_space(walk, atom, spots[atom], blocks[atom], readers, names), outputs=tuple(outputs.get(atom, ())))
        for _, atom in ranked
    )


def _outputs(
    walk: Walk, spots: Mapping[Axis, Sequence[tuple[str, _Spot]]], readers: Mapping[tuple[str, int], str]
) -> dict[Axis, dict[str, None]]:
    """The names of the outputs beside the logits with channels of each atom; atoms read at one site are frozen."""
    names: dict[Axis, dict[str, None]] = {}
    for name, label in walk.outputs:
        for atom in (spot.occurrence.atom for spot in _spots(label) if spot.occurrence.atom in spots):
            sites = {readers.get((parameter, spot.dim)) for parameter, spot in spots[atom]} - {None}
            if len(sites) > 1 and not atom.reason:
                names.setdefault(atom, {})[name] = None
            else:
                freeze(atom, f"the model returns it as {name}")
    return names


def _parameter_spots(walk: Walk) -> dict[Axis, list[tuple[str, _Spot]]]:
    spots: dict[Axis, list[tuple[str, _Spot]]] = {}
    for parameter, label in walk.parameters.items():
        for spot in _spots(label):
            if spot.occurrence.atom.size > 1:
                spots.setdefault(spot.occurrence.atom, []).append((parameter, spot))
    return spots


def _spots(label: Label) -> Iterable[_Spot]:
    for dim, axis in enumerate(label):
        if axis is not None:
            for occurrence in occurrences(axis):
                yield _Spot(dim, occurrence)


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
        for spot in _spots(label):
            atom = spot.occurrence.atom
            if atom not in wanted:
                continue
            beside = _companions(label, spot)
            if atom in common:
                common[atom] = {axis: None for axis in common[atom] if axis in beside}
            else:
                common[atom] = beside
    return {atom: [] if atom.reason else list(common[atom]) for atom in wanted}


def _companions(label: Label, spot: _Spot) -> dict[Axis, None]:
    """The atoms that accompany an occurrence: the other factors of its dimension, and the factors of other dimensions.

    An atom found twice is ambiguous and is left out.
    """
    same = [loop.axis for loop in spot.occurrence.siblings]
    others = [
        loop.axis for dim, axis in enumerate(label) if axis is not None and dim != spot.dim for loop in loops(axis)
    ]
    unique = [axis for axis in same if same.count(axis) == 1]
    unique += [axis for axis in others if others.count(axis) == 1 and axis not in same]
    return {axis: None for axis in unique if axis.kind == "atom" and axis is not spot.occurrence.atom}


def _space(
    walk: Walk,
    atom: Axis,
    places: Sequence[tuple[str, _Spot]],
    blocks: Sequence[Axis],
    readers: Mapping[tuple[str, int], str],
    names: UniqueNames,
) -> ChannelSpace:
    members: list[Member] = []
    for key, group in itertools.groupby(places, key=lambda place: (place[0], place[1].dim)):
        members += _members(walk, key, [spot for _, spot in group], blocks, readers)
    count = members[0].positions.shape[0]
    freedom: str = "frozen" if atom.reason else "blocks" if count > 1 else "free"
    name = names.take(_name(places, count, readers))
    return ChannelSpace(name, atom.size, count, freedom, tuple(members), atom.reason)  # type: ignore[arg-type]


def _members(
    walk: Walk,
    key: tuple[str, int],
    spots: Sequence[_Spot],
    blocks: Sequence[Axis],
    readers: Mapping[tuple[str, int], str],
) -> list[Member]:
    """The members for one dimension of a parameter: a single one that holds all copies, or one per copy if they overlap
    or involve different dimensions.
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


def _positions(label: Label, spot: _Spot, blocks: Sequence[Axis]) -> tuple[tuple[int, ...], Tensor]:
    """`Member.dims` and `Member.positions`, (blocks, copies, size), of one occurrence."""
    beside = {loop.axis for loop in spot.occurrence.siblings}
    elsewhere = [
        dim
        for dim, axis in enumerate(label)
        if axis is not None
        and dim != spot.dim
        and any(loop.axis in blocks and loop.axis not in beside for loop in loops(axis))
    ]
    dims = tuple(sorted([spot.dim, *elsewhere]))
    atom_loop = Loop(spot.occurrence.atom, spot.occurrence.stride)
    offset, stride, around = 0, 1, []
    for dim in reversed(dims):
        axis = label[dim]
        assert axis is not None
        if dim == spot.dim:
            offset = spot.occurrence.offset * stride
            inner = spot.occurrence.siblings
            atom_loop = Loop(atom_loop.axis, atom_loop.stride * stride)
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


def _name(places: Sequence[tuple[str, _Spot]], blocks: int, readers: Mapping[tuple[str, int], str]) -> str:
    """The name of a space, prefixed with the common prefix of the modules that read it.

    "input" for channels read at one site, "residual" for channels read at several sites, and "heads" or
    "heads_in_group" for groups of channels (stride > 1), without and with several blocks.
    """
    reading = [(parameter, spot) for parameter, spot in places if (parameter, spot.dim) in readers]
    owners = [owner(parameter) for parameter, _ in reading]
    prefix = common_prefix(owners)
    if all(spot.occurrence.stride == 1 for _, spot in reading):
        sites = {readers[parameter, spot.dim] for parameter, spot in reading}
        return dotted(prefix, "input" if len(sites) == 1 else "residual")
    parent = prefix.rpartition(".")[0] if len(set(owners)) == 1 else prefix
    return dotted(parent, "heads" if blocks == 1 else "heads_in_group")
