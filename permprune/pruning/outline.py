"""The layers that a run prunes and the orders it searches, from shapes alone: a few blocks are traced, and repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from permprune.calibration.symmetric import stored_elements
from permprune.models.layers import Layer
from permprune.models.shallow import Repetition
from permprune.pattern import Pattern
from permprune.pruning.problem import Part, Problem


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

    def layers_by_input(self) -> dict[str, list[Layer]]:
        """Return the layers by what they read, in the order of `layers`."""
        readers: dict[str, list[Layer]] = {}
        for layer in self.layers:
            readers.setdefault(self.sites[layer.name], []).append(layer)
        return readers

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
