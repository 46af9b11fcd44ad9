"""The problems of a search: for each set of channels that may be reordered, the weight columns that move with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permprune.coupling.space import ChannelSpace, Coupling, Site
from permprune.errors import PermpruneError
from permprune.models.layers import Layer
from permprune.options import MODES
from permprune.pattern import Pattern
from permprune.system.progress import log

Orders = dict[str, Tensor]
"""For each problem, by name, its order: int64 (size,); position i holds channel order[i]."""


@dataclass(frozen=True)
class Part:
    """The columns of one layer's weight that run along a problem's channels.

    Channel c of the problem is column `columns[c]` of the layer; `columns` is int64 (size,), whole aligned groups.
    """

    layer: str
    site: str
    columns: Tensor


@dataclass(frozen=True)
class Problem:
    """One order to find: that of `size` channels, which the input channels of the `parts` follow.

    `space` and `block` name the block of the `ChannelSpace` that the order folds into; if `space` is empty, the order
    needs a gather at `site`.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    space: str = ""
    block: int = 0
    site: str = ""

    def identity(self) -> Tensor:
        return torch.arange(self.size)


def build_problems(coupling: Coupling, layers: list[Layer], pattern: Pattern, mode: str) -> list[Problem]:
    """The orders a mode may choose.

    `fold`: every space that is free, whole or block by block, the residual stream included.
    `gather`: the spaces whose channels are read at one place fold all the same; every other place where pruned
    layers read gets an order of its own. Raises `PermpruneError` for an unknown mode.
    """
    if mode not in MODES:
        raise PermpruneError(f'unknown mode "{mode}": choose fold or gather')
    pruned = {layer.parameter: layer for layer in layers}
    problems: list[Problem] = []
    covered: set[str] = set()
    for space in coupling.spaces:
        sites = {reader.site for reader in space.readers if reader.parameter in pruned}
        found = _space_problems(space, pruned, pattern)
        if space.freedom == "frozen" and found and mode == "fold":
            log.warning("%s keeps its order: %s", space.name, space.reason)
        if space.freedom == "frozen" or (mode == "gather" and len(sites) > 1):
            continue
        covered.update(part.layer for problem in found for part in problem.parts)
        problems += found
    if mode == "gather":
        sites_by_reader = [_site_problem(site, pruned, covered, pattern) for site in coupling.sites]
        problems += [problem for problem in sites_by_reader if problem]
    return problems


def _space_problems(space: ChannelSpace, pruned: dict[str, Layer], pattern: Pattern) -> list[Problem]:
    problems = []
    for block in range(space.blocks):
        parts = tuple(
            Part(pruned[reader.parameter].name, reader.site or "", columns)
            for reader in space.readers
            if reader.parameter in pruned
            for columns in reader.positions[block]
            if _whole_groups(columns, pattern)
        )
        if parts:
            name = space.name if space.blocks == 1 else f"{space.name}[{block}]"
            problems.append(Problem(name, space.size, parts, space=space.name, block=block))
    return problems


def _site_problem(site: Site, pruned: dict[str, Layer], covered: set[str], pattern: Pattern) -> Problem | None:
    layers = [pruned[p] for p in site.readers if p in pruned and pruned[p].name not in covered]
    if not layers or not pattern.divides(site.size) or site.size == pattern.m:
        return None
    parts = tuple(Part(layer.name, site.name, torch.arange(site.size)) for layer in layers)
    return Problem(site.name, site.size, parts, site=site.name)


def _whole_groups(columns: Tensor, pattern: Pattern) -> bool:
    """Whether the columns are runs of m neighbours that are groups of the pattern; else their order changes nothing."""
    if len(columns) % pattern.m or len(columns) == pattern.m:
        return False
    groups = columns.view(-1, pattern.m)
    first = groups[:, :1]
    return bool((first % pattern.m == 0).all() and (groups == first + torch.arange(pattern.m)).all())
