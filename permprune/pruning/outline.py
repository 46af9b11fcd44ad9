"""The layers that a run prunes and the orders it searches, from shapes alone: a few blocks are traced, and repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        return {layer.name: -(-len(layer.weight) // self.shards) for layer in self.layers}

    @cached_property
    def widths(self) -> dict[str, int]:
        """The number of channels of each tensor that layers read."""
        return {self.sites[layer.name]: layer.weight.shape[1] for layer in self.layers}

    @cached_property
    def weights(self) -> int:
        """The number of weights of all layers."""
        return sum(self.rows[layer.name] * layer.weight.shape[1] for layer in self.layers)

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
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(self.sites[layer.name], []).append(layer)
        return found

    def moments(self) -> int:
        """The number of elements that are stored of the second moments of all tensors that layers read."""
        return sum(map(stored_elements, self.widths.values())) // self.shards

    def repeat(self, lists: Sequence[Repetition]) -> Outline:
        """The outline of the whole model, given that of the model without the blocks that `lists` leaves out.

        `layers` remain those of the blocks that were traced.
        """
        sites, problems = dict(self.sites), list(self.problems)
        for one in lists:
            sites |= _repeated_sites(sites, one)
            problems = _repeated_problems(problems, one)
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


def _repeated_sites(sites: Mapping[str, str], one: Repetition) -> dict[str, str]:
    found = {}
    for layer, site in sites.items():
        number = one.number_of(layer)
        for by in one.copies(number) if number is not None else ():
            found[one.shifted(layer, by)] = one.shifted(site, by)
    return found


def _repeated_problems(problems: Iterable[Problem], one: Repetition) -> list[Problem]:
    """Copy problems inside a block for each block that equals it, left out of the trace.

    Problems that span blocks get the parts of the blocks that were left out.
    """
    found = []
    for problem in problems:
        numbers = {one.number_of(part.layer) for part in problem.parts}
        found.append(problem)
        if len(numbers) == 1 and None not in numbers:
            (number,) = numbers
            found += [_shifted(problem, one, by) for by in one.copies(number or 0)]
            continue
        parts = list(problem.parts)
        for number in sorted(number for number in numbers if number is not None):
            own = [part for part in problem.parts if one.number_of(part.layer) == number]
            parts += [_shifted_part(part, one, by) for by in one.copies(number) for part in own]
        found[-1] = dataclasses.replace(problem, parts=tuple(parts))
    return found


def _shifted(problem: Problem, one: Repetition, by: int) -> Problem:
    move: Callable[[str], str] = lambda name: one.shifted(name, by)  # noqa: E731
    return dataclasses.replace(
        problem,
        name=move(problem.name),
        parts=tuple(_shifted_part(part, one, by) for part in problem.parts),
        space=move(problem.space),
        site=move(problem.site),
    )


def _shifted_part(part: Part, one: Repetition, by: int) -> Part:
    return Part(one.shifted(part.layer, by), one.shifted(part.site, by), part.columns)
