"""What coupling finds: spaces of channels that move together, and the tensors that linears read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["reads", "writes", "scales"]


@dataclass(frozen=True)
class Member:
    """One parameter that runs along a space.

    `parameter` is its name in `named_parameters()` (the first one where weights are tied). `dims` are the
    dimensions that run along the space, in rising order; more than one where another dimension tells the
    blocks apart (experts). `positions` is int64 (blocks, copies, size): where index i of block b lives, for
    each copy, in the row-major flattening of `dims`. `role` is "reads" for the input dimension of a linear,
    "writes" for the output dimension of a linear, convolution or embedding, "scales" for all else. `site`
    names the `Site` whose tensor a reader reads.
    """

    parameter: str
    dims: tuple[int, ...]
    positions: Tensor
    role: Role
    site: str | None = None


@dataclass(frozen=True)
class ChannelSpace:
    """Channels that must be permuted together in every member, or the network's outputs change.

    `size` channels in each of `blocks` blocks; each block has its own permutation. A permutation of a space
    is an int64 table (blocks, size): the new position i of block b holds the old channel `table[b, i]`. A
    "frozen" space cannot move, for the `reason` given.
    """

    name: str
    size: int
    blocks: int
    freedom: Literal["free", "blocks", "frozen"]
    members: tuple[Member, ...]
    reason: str = ""

    @property
    def readers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "reads")


@dataclass(frozen=True)
class Site:
    """One activation tensor that one or more linears read along its last dimension, `size` wide.

    `readers` are the weights that read it. `gather` says where an `index_select` can reorder it for all of
    them and nobody else: ("output", module) at the output of that module; ("input",) at the input of each
    reading module.
    """

    name: str
    readers: tuple[str, ...]
    size: int
    gather: tuple[str, ...]


@dataclass(frozen=True)
class Coupling:
    """All spaces and sites of a model, in the order in which the model first reads them."""

    spaces: tuple[ChannelSpace, ...]
    sites: tuple[Site, ...]
