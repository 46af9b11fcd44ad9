"""Folding: apply a permutation of a channel space to the parameters without changing the network's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permprune.checkpoints.probe import largest_difference
from permprune.coupling.space import ChannelSpace, Coupling, Member
from permprune.errors import PermpruneError
from permprune.models.forward import forward_arguments, inference, main_outputs


@torch.no_grad()
def fold(model: nn.Module, space: ChannelSpace, table: Tensor) -> None:
    """Permute every member of a space in place: new[positions[b, c, i]] = old[positions[b, c, table[b, i]]].

    `table` is an integer tensor (blocks, size) whose rows are permutations; for a space with one block, (size,) is
    accepted too. Raises `PermpruneError`, before any parameter is changed, if the space is frozen, the table is not a
    permutation, or a member does not fit the model.
    """
    table = check_table(space, table)
    for member in space.members:
        _check_member(model, space, member)
    for member in space.members:
        _move(model.get_parameter(member.parameter), member, table)


def fold_all(model: nn.Module, tables: Mapping[str, Tensor], coupling: Coupling) -> None:
    """Fold several spaces, in the order of `coupling.spaces`. `tables` maps names of spaces to permutations.

    The order matters if one space permutes the blocks of another, as with heads and the channels within them: row b of
    a table applies to the block that is at position b when its space is folded. Channels are folded before the heads
    that contain them. All tables are checked before any parameter is changed; raises `PermpruneError` for an unknown
    space or an invalid table.
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
    """Permute one parameter in place as `fold_all` would. `name` is its `Member.parameter` name in the coupling."""
    for space in coupling.spaces:
        if space.name in tables:
            table = check_table(space, tables[space.name])
            for member in space.members:
                if member.parameter == name:
                    _move(parameter, member, table)


def check_table(space: ChannelSpace, table: Tensor) -> Tensor:
    """The table as int64 (blocks, size) on the CPU. Raises `PermpruneError` if it cannot permute the space."""
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
            f"the table of {space.name} is not a permutation: each row must hold 0..{space.size - 1} once"
        )
    return table


def _check_member(model: nn.Module, space: ChannelSpace, member: Member) -> None:
    try:
        shape = model.get_parameter(member.parameter).shape
    except AttributeError:
        raise PermpruneError(f"the model has no parameter {member.parameter}, a member of {space.name}") from None
    if max(member.dims) >= len(shape):
        raise PermpruneError(f"{member.parameter} has no dimension {max(member.dims)}, which {space.name} needs")
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


def verify_space(
    model: nn.Module,
    space: ChannelSpace,
    example: Mapping[str, Tensor],
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """Fold a random permutation, compare the outputs on the example batch, and fold the inverse to restore the model.

    Returns the largest absolute difference over all outputs, computed in the model's own precision. Raises
    `PermpruneError` if the difference exceeds max(`tolerance`, 8 * machine epsilon) times the largest absolute output
    (a changed order of summation changes the rounding, which matters in half precision), or if the space is frozen.
    Outputs that are not floating point must be equal.
    """
    table = _random_table(space, seed)
    before = _outputs(model, example)
    fold(model, space, table)
    try:
        after = _outputs(model, example)
    finally:
        fold(model, space, table.argsort(dim=-1))
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        difference, scale = largest_difference(old, new)
        bound = max(tolerance, 8 * torch.finfo(old.dtype).eps) * scale if old.is_floating_point() else 0.0
        if not difference <= bound:
            raise PermpruneError(
                f"permuting {space.name} changes the model's output by {difference:.3g} (of {scale:.3g}): "
                "this is a bug in the coupling analysis: prune with --mode gather, and report the model"
            )
        worst = max(worst, difference)
    return worst


def _random_table(space: ChannelSpace, seed: int) -> Tensor:
    """A random permutation for each block, never the identity, which would verify nothing."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.stack([torch.randperm(space.size, generator=generator) for _ in range(space.blocks)])
    identity = (table == torch.arange(space.size)).all(dim=1, keepdim=True)
    return torch.where(identity, table.roll(1, dims=1), table)


def _outputs(model: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with inference(model):
        output = model(**forward_arguments(model, example))
    return [leaf.clone() for leaf in main_outputs(output) if isinstance(leaf, Tensor)]
