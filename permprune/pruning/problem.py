"""The problems of a search: sets of channels that can be reordered, with the weight columns that follow each order."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from permprune.calibration.symmetric import stored_elements
from permprune.coupling.space import ChannelSpace, Coupling, Member, Site
from permprune.models.layers import Layer
from permprune.models.shallow import Repetition
from permprune.pattern import Pattern
from permprune.system.progress import log

Orders = dict[str, Tensor]
"""The order of each problem, by name: int64 (size,); position i holds channel order[i]."""


@dataclass(frozen=True)
class Part:
    """The columns of one layer's weight that follow a problem's order.

    Channel c of the problem is column `columns[c]` of the layer. `columns` is int64 (size,) and consists of whole,
    aligned groups of the pattern. `site` is the name of what the layer reads (see `Layer.input_of`).
    """

    layer: str
    site: str
    columns: Tensor

    @cached_property
    def span(self) -> slice | Tensor:
        """The columns as an index: a slice, which makes no copy, if they are consecutive."""
        first = int(self.columns[0])
        consecutive = torch.equal(self.columns, torch.arange(first, first + len(self.columns)))
        return slice(first, first + len(self.columns)) if consecutive else self.columns


@dataclass(frozen=True)
class Problem:
    """One order to find: an order of `size` channels, which the input channels of the `parts` follow.

    `space` and `block` identify the block of a `ChannelSpace` into which the order is folded. If `space` is empty, the
    order needs a gather at `site`.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    space: str = ""
    block: int = 0
    site: str = ""

    def identity(self) -> Tensor:
        """Return the natural order, int64 (size,)."""
        return torch.arange(self.size)


def build_problems(coupling: Coupling, layers: list[Layer], pattern: Pattern, mode: str) -> list[Problem]:
    """Return the problems of a mode, that is, the orders that a search may choose.

    `fold`: an order for every space that is free, or for each of its blocks; the residual stream is one of them.
    `gather`: spaces whose channels are read at only one site are folded as well; every other site that pruned layers
    read gets an order of its own.
    """
    pruned: dict[str, list[Layer]] = {}
    for layer in layers:
        pruned.setdefault(layer.parameter, []).append(layer)
    problems: list[Problem] = []
    covered: set[str] = set()
    for space in coupling.spaces:
        sites = {reader.site for reader in space.readers if reader.parameter in pruned}
        of_space = _space_problems(space, pruned, pattern)
        if space.freedom == "frozen" and of_space and mode == "fold":
            log.warning("%s keeps its order: %s", space.name, space.reason)
        if space.freedom == "frozen" or (mode == "gather" and len(sites) > 1):
            continue
        covered.update(part.layer for problem in of_space for part in problem.parts)
        problems += of_space
    if mode == "gather":
        sites_by_reader = [_site_problem(site, pruned, covered, pattern) for site in coupling.sites]
        problems += [problem for problem in sites_by_reader if problem]
    return problems


def _space_problems(space: ChannelSpace, pruned: dict[str, list[Layer]], pattern: Pattern) -> list[Problem]:
    problems = []
    for block in range(space.blocks):
        parts = tuple(
            Part(layer.name, layer.input_of(reader.site or ""), columns)
            for reader in space.readers
            for layer, columns in _columns(reader, block, pruned.get(reader.parameter, []))
            if _whole_groups(columns, pattern)
        )
        if parts:
            name = space.name if space.blocks == 1 else f"{space.name}[{block}]"
            problems.append(Problem(name, space.size, parts, space=space.name, block=block))
    return problems


def _columns(reader: Member, block: int, layers: list[Layer]) -> list[tuple[Layer, Tensor]]:
    """Return the columns of each of a parameter's layers at the positions of a block, once for each copy of the block.

    Positions that the first dimension of experts is part of are in the matrix of one expert; others are in all.
    """
    copies = reader.positions[block]
    if not layers or layers[0].expert is None or reader.dims[0] != 0:
        return [(layer, columns) for layer in layers for columns in copies]
    width, by_expert = layers[0].shape[1], {layer.expert: layer for layer in layers}
    experts = [set((columns // width).tolist()) for columns in copies]
    owners = [by_expert.get(numbers.pop()) if len(numbers) == 1 else None for numbers in experts]
    return [(layer, columns % width) for layer, columns in zip(owners, copies, strict=True) if layer is not None]


def _site_problem(site: Site, pruned: dict[str, list[Layer]], covered: set[str], pattern: Pattern) -> Problem | None:
    readers = [layer for parameter in site.readers for layer in pruned.get(parameter, []) if layer.name not in covered]
    layers = [layer for layer in readers if layer.reads_input]
    if len(layers) < len(readers):
        log.warning("%s keeps its order: no module of the model reads it, so that no gather can reorder it", site.name)
    if not layers or not pattern.divides(site.size) or site.size == pattern.m:
        return None
    parts = tuple(Part(layer.name, layer.input_of(site.name), torch.arange(site.size)) for layer in layers)
    return Problem(site.name, site.size, parts, site=site.name)


def _whole_groups(columns: Tensor, pattern: Pattern) -> bool:
    """Whether the columns are two or more whole, aligned groups of the pattern; otherwise no order is searched."""
    if len(columns) % pattern.m or len(columns) == pattern.m:
        return False
    groups = columns.view(-1, pattern.m)
    first = groups[:, :1]
    return bool((first % pattern.m == 0).all() and (groups == first + torch.arange(pattern.m)).all())


@dataclass(frozen=True)
class Outline:
    """The layers to prune, what each of them reads (`Layer.input_of`), and the orders to find.

    `repeated` are the lists of blocks of which only the first ones were traced. `dtype` is the type in which a search
    holds the weights of the layers. Rows, weights and moments are those of one of `shards` processes that divide them.
    """

    pattern: Pattern
    layers: Sequence[Layer]
    sites: Mapping[str, str]
    problems: Sequence[Problem]
    repeated: Sequence[Repetition] = ()
    dtype: torch.dtype = torch.float32
    shards: int = 1

    @cached_property
    def rows(self) -> dict[str, int]:
        """The number of rows of each layer."""
        return {layer.name: -(-layer.shape[0] // self.shards) for layer in self.layers}

    @cached_property
    def widths(self) -> dict[str, int]:
        """The number of channels of each tensor that layers read."""
        return {self.sites[layer.name]: layer.shape[1] for layer in self.layers}

    @cached_property
    def blocks(self) -> list[list[Layer]]:
        """The layers of each block, whose names begin alike, up to the first number."""
        by_name = defaultdict[tuple[str, ...], list[Layer]](list)
        for layer in self.layers:
            by_name[tuple(re.split(r"\.(\d+)\.", layer.name, maxsplit=1)[:2])].append(layer)
        return [*by_name.values()]

    @cached_property
    def block_sums(self) -> int:
        """The most elements that are stored of the second moments of all tensors that the layers of a block read."""
        read = ({self.sites[layer.name]: layer.shape[1] for layer in block} for block in self.blocks)
        return max(sum(map(stored_elements, widths.values())) for widths in read)

    @cached_property
    def weights(self) -> int:
        """The number of weights of all layers."""
        return sum(self.rows[layer.name] * layer.shape[1] for layer in self.layers)

    def rows_of(self, problem: Problem) -> int:
        """The number of weight rows that follow a problem's order."""
        return sum(self.rows[part.layer] for part in problem.parts)

    def largest(self, count: int) -> list[Problem]:
        """The problems with the most weights."""
        return sorted(self.problems, key=lambda problem: -problem.size * self.rows_of(problem))[:count]

    def largest_weights(self, count: int) -> int:
        """The number of weights of the problems with the most weights."""
        return sum(problem.size * self.rows_of(problem) for problem in self.largest(count))

    def moments(self) -> int:
        """The number of elements that are stored of the second moments of all tensors that layers read."""
        return sum(map(stored_elements, self.widths.values())) // self.shards

    def repeat(self, lists: Sequence[Repetition]) -> Outline:
        """The outline of the whole model, given that of the model without the blocks that `lists` leaves out.

        `layers` remain those of the blocks that were traced.
        """
        sites, problems = dict(self.sites), list(self.problems)
        for repetition in lists:
            sites |= _repeated_sites(sites, repetition)
            problems = _repeated_problems(problems, repetition)
        return Outline(self.pattern, self.layers, sites, problems, lists)

    def of(self, layers: Iterable[Layer]) -> Outline:
        """The outline with only these layers, as far as they are used, and their sites and problems."""
        used = [layer for layer in layers if layer.name in self.sites]
        names = {layer.name for layer in used}
        problems = [
            dataclasses.replace(problem, parts=tuple(part for part in problem.parts if part.layer in names))
            for problem in self.problems
        ]
        sites = {layer.name: self.sites[layer.name] for layer in used}
        return Outline(self.pattern, used, sites, [problem for problem in problems if problem.parts], self.repeated)


def _repeated_sites(sites: Mapping[str, str], repetition: Repetition) -> dict[str, str]:
    repeated = {}
    for layer, site in sites.items():
        number = repetition.number_of(layer)
        for by in repetition.copies(number) if number is not None else ():
            repeated[repetition.shifted(layer, by)] = repetition.shifted(site, by)
    return repeated


def _repeated_problems(problems: Iterable[Problem], repetition: Repetition) -> list[Problem]:
    """Copy problems inside a block for each block that equals it, left out of the trace.

    Problems that span blocks get the parts of the blocks that were left out.
    """

    def shifted(part: Part, by: int) -> Part:
        return Part(repetition.shifted(part.layer, by), repetition.shifted(part.site, by), part.columns)

    repeated = []
    for problem in problems:
        numbers = {repetition.number_of(part.layer) for part in problem.parts}
        if len(numbers) == 1 and None not in numbers:
            repeated.append(problem)
            for by in repetition.copies(numbers.pop() or 0):
                name, space, site = (
                    repetition.shifted(text, by) for text in (problem.name, problem.space, problem.site)
                )
                parts = tuple(shifted(part, by) for part in problem.parts)
                repeated.append(dataclasses.replace(problem, name=name, parts=parts, space=space, site=site))
            continue
        parts = problem.parts
        for number in sorted(number for number in numbers if number is not None):
            in_block = [part for part in problem.parts if repetition.number_of(part.layer) == number]
            parts += tuple(shifted(part, by) for by in repetition.copies(number) for part in in_block)
        repeated.append(dataclasses.replace(problem, parts=parts))
    return repeated
