"""Results of coupling: channel spaces (channels permuted together) and sites (tensors that linears read)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["reads", "writes", "scales"]
Freedom = Literal["free", "blocks", "frozen"]


@dataclass(frozen=True)
class Member:
    """A parameter that has to be permuted with a space.

    `parameter` is its name in `named_parameters()` (for tied weights, the first name). `dims` are the dimensions that
    hold the space's channels, in ascending order; more than one if another dimension distinguishes the blocks, as with
    experts. `positions` is int64 (blocks, copies, size): for each copy, the position of channel i of block b in the
    row-major flattening of `dims`. `role` is "reads" for the input dimension of a linear, "writes" for the output
    dimension of a linear, convolution or embedding, and "scales" for anything else, such as a bias or a norm. `site`
    is the name of the `Site` that a "reads" member reads; None for the other roles.
    """

    parameter: str
    dims: tuple[int, ...]
    positions: Tensor
    role: Role
    site: str | None = None


@dataclass(frozen=True)
class ChannelSpace:
    """Channels that have to be permuted together in all members to keep the network's outputs unchanged.

    A space has `blocks` blocks of `size` channels, and each block has its own permutation. A permutation of a space is
    an int64 table (blocks, size): position i of block b receives the old channel `table[b, i]`. `freedom` is "free" for
    a space of one block, "blocks" for one of several, and "frozen" for one that must not be permuted; `reason` then
    says why. `outputs` are the names of the tensors beside the logits that the model returns with these channels, and
    so in their new order.
    """

    name: str
    size: int
    blocks: int
    freedom: Freedom
    members: tuple[Member, ...]
    reason: str = ""
    outputs: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[Member, ...]:
        """The members whose role is "reads"."""
        return tuple(member for member in self.members if member.role == "reads")


@dataclass(frozen=True)
class Site:
    """An activation tensor that one or more linears read; its last dimension is `size` wide.

    `readers` are the names of the linears' weights. `gather` says where an `index_select` can reorder the tensor for
    these linears without affecting other users: ("output", module) at the output of that module; ("input",) at the
    input of each reading module.
    """

    name: str
    readers: tuple[str, ...]
    size: int
    gather: tuple[str, ...]


@dataclass(frozen=True)
class Coupling:
    """All spaces and sites of a model, in the order in which its forward pass first reads them."""

    spaces: tuple[ChannelSpace, ...]
    sites: tuple[Site, ...]

    def reordered(self, folded: Iterable[str]) -> dict[str, list[str]]:
        """The outputs beside the logits that have channels of the `folded` spaces, each with the names of these."""
        outputs: dict[str, list[str]] = {}
        names = set(folded)
        for space in self.spaces:
            for output in space.outputs if space.name in names else ():
                outputs.setdefault(output, []).append(space.name)
        return outputs
