"""Folding: writing a space's permutation into the parameters, so that the network computes what it did
before."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permprune.coupling.space import ChannelSpace, Coupling, Member
from permprune.errors import PermpruneError


@torch.no_grad()
def fold(model: nn.Module, space: ChannelSpace, table: Tensor) -> None:
    """Permute every member of a space in place: new[positions[b, c, i]] = old[positions[b, c, table[b, i]]].

    `table` is (blocks, size), integer, each row a permutation; a vector will do where there is one block.
    Raises `PermpruneError` for a frozen space, for a table that is no permutation and for a member that does
    not fit the model, before anything is changed.
    """
    table = check_table(space, table)
    for member in space.members:
        _check_member(model, space, member)
    for member in space.members:
        _move(model.get_parameter(member.parameter), member, table)


def fold_all(model: nn.Module, tables: Mapping[str, Tensor], coupling: Coupling) -> None:
    """Fold several spaces, in the order of `coupling.spaces`; every table is checked first.

    The order counts where one space's channels lie in another's blocks: a table's block b is the one that
    stands b-th when the space's turn comes. Channels come before the heads that hold them.
    """
    spaces = {space.name: space for space in coupling.spaces}
    for name, table in tables.items():
        if name not in spaces:
            raise PermpruneError(f"there is no space named {name}: the model has {', '.join(spaces) or 'none'}")
        check_table(spaces[name], table)
    for name, space in spaces.items():
        if name in tables:
            fold(model, space, tables[name])


@torch.no_grad()
def fold_parameter(name: str, parameter: Tensor, tables: Mapping[str, Tensor], coupling: Coupling) -> None:
    """Do to one parameter, in place, what `fold_all` does to all of them; `name` is its name in the coupling."""
    for space in coupling.spaces:
        if space.name in tables:
            table = check_table(space, tables[space.name])
            for member in space.members:
                if member.parameter == name:
                    _move(parameter, member, table)


def inverse(table: Tensor) -> Tensor:
    """The table that undoes a table, block by block: (blocks, size)."""
    return table.argsort(dim=-1)


def check_table(space: ChannelSpace, table: Tensor) -> Tensor:
    """The table as int64 (blocks, size) on the CPU. Raises `PermpruneError` when it cannot permute the
    space."""
    if space.freedom == "frozen":
        raise PermpruneError(f"space {space.name} is frozen and cannot be permuted: {space.reason}")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise PermpruneError(f"the table of {space.name} holds {table.dtype}: give integers")
    table = table.detach().to("cpu", torch.int64)
    if table.dim() == 1 and space.blocks == 1:
        table = table[None]
    if table.shape != (space.blocks, space.size):
        raise PermpruneError(
            f"the table of {space.name} has shape {tuple(table.shape)}: it must be ({space.blocks}, {space.size})"
        )
    if not torch.equal(table.sort(dim=1).values, torch.arange(space.size).expand_as(table)):
        raise PermpruneError(
            f"the table of {space.name} is no permutation: each row must hold 0..{space.size - 1} once"
        )
    return table


def _check_member(model: nn.Module, space: ChannelSpace, member: Member) -> None:
    try:
        shape = model.get_parameter(member.parameter).shape
    except AttributeError:
        raise PermpruneError(f"the model has no parameter {member.parameter}, a member of {space.name}") from None
    if max(member.dims) >= len(shape):
        raise PermpruneError(f"{member.parameter} has no dimension {max(member.dims)}, as {space.name} asks")
    width = math.prod(shape[dim] for dim in member.dims)
    positions = member.positions
    fits = positions.shape[::2] == (space.blocks, space.size) and int(positions.min()) >= 0
    if not fits or int(positions.max()) >= width or positions.unique().numel() != positions.numel():
        raise PermpruneError(f"the positions of {space.name} do not fit {member.parameter}, whose width is {width}")


def _move(parameter: Tensor, member: Member, table: Tensor) -> None:
    front = tuple(range(len(member.dims)))
    moved = parameter.detach().movedim(member.dims, front)
    width = math.prod(moved.shape[: len(front)])
    source = torch.arange(width)
    source[member.positions] = member.positions.gather(2, table[:, None, :].expand_as(member.positions))
    rows = moved.reshape(width, -1).index_select(0, source.to(parameter.device))
    moved.copy_(rows.view(moved.shape))
