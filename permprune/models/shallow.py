"""Models with fewer blocks: of many equal blocks, only the first ones are traced or run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from permprune.models.layers import blocks

TWICE = 2
"""Number of blocks of each kind that remain: the first block of a model can read other inputs than later ones."""


@dataclass(frozen=True)
class Repetition:
    """The blocks of one list of a model, and the first ones, which represent all.

    `name` is the list's name in the model. `equals[i]` is the number of the block, among the first `kept`, that block
    `kept` + i equals: both have the same modules with parameters of the same shapes.
    """

    name: str
    kept: int
    equals: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of blocks in the whole model."""
        return self.kept + len(self.equals)

    def number_of(self, name: str) -> int | None:
        """The number of the block in which a module or parameter lies; None if it is in no block of this list."""
        match = re.match(rf"{re.escape(self.name)}\.(\d+)(\.|$)", name)
        return int(match[1]) if match else None

    def shifted(self, name: str, by: int) -> str:
        """The name of the module or parameter at the same place `by` blocks later; names outside stay as they are."""
        number = self.number_of(name)
        if number is None:
            return name
        return f"{self.name}.{number + by}{name.removeprefix(f'{self.name}.{number}')}"

    def copies(self, number: int) -> list[int]:
        """The distances to the left-out blocks that equal block `number`."""
        return [self.kept + i - number for i, equal in enumerate(self.equals) if equal == number]


def repetitions(model: nn.Module) -> list[Repetition]:
    """Find the lists of blocks whose first ones represent the rest: up to `TWICE` blocks of each kind remain."""
    inside = {id(block) for block in blocks(model)}
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(id(block) in inside for block in module):
            kinds = [_kind(block) for block in module]
            kept = _prefix(kinds)
            last = {kind: number for number, kind in enumerate(kinds[:kept])}
            if kept < len(kinds):
                lists.append(Repetition(name, kept, tuple(last[kind] for kind in kinds[kept:])))
    return lists


@contextmanager
def shortened(model: nn.Module, lists: Sequence[Repetition]) -> Iterator[None]:
    """A context in which the model has only the blocks that `lists` keeps."""
    before = {one.name: model.get_submodule(one.name) for one in lists}
    try:
        for one in lists:
            model.set_submodule(one.name, before[one.name][: one.kept])  # type: ignore[index]
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What equal blocks have in common: the names and types of the modules, and the shapes of the parameters."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _prefix(kinds: Sequence[object]) -> int:
    """The least number of blocks among which every kind is found twice, or as often as it occurs."""
    wanted = {kind: min(TWICE, count) for kind, count in Counter(kinds).items()}
    seen: Counter[object] = Counter()
    for number, kind in enumerate(kinds):
        if all(seen[one] >= count for one, count in wanted.items()):
            return number
        seen[kind] += 1
    return len(kinds)
