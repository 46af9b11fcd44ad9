"""The memory and the work of a run, by stage and part, for forecasts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

Place = Literal["device", "host", "disk"]
"""Where a part is: in the memory of the device that computes or of the host, the same on a CPU, or in a file."""


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a stage holds, by name and place."""

    name: str
    bytes: int
    place: Place = "device"


@dataclass(frozen=True)
class Work:
    """The operations of a stage.

    Attributes:
        products: Floating-point operations of matrix products in the type of the activations.
        products_fp32: Floating-point operations of matrix products in fp32.
        comparisons: Element operations of `add_placement_cost`, each a comparison, a difference and a sum.
        largest: The share of `comparisons` that belong to the largest problem, which one thread solves.
        moved: Bytes that operations on single elements read from memory or write to it.
        stored: Bytes read from disk or written to it.
    """

    products: float = 0.0
    products_fp32: float = 0.0
    comparisons: float = 0.0
    moved: float = 0.0
    stored: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Work) -> Work:
        """The work of both; `largest` is 0."""
        return Work(**{name: amount + vars(other)[name] for name, amount in self._amounts().items()})

    def __mul__(self, factor: float) -> Work:
        return Work(**{name: amount * factor for name, amount in self._amounts().items()}, largest=self.largest)

    def _amounts(self) -> dict[str, float]:
        return {name: amount for name, amount in vars(self).items() if name != "largest"}


@dataclass(frozen=True)
class Stage:
    """A stage of a run: the parts that it holds at its peak, and its work; None if the work is not known.

    `limited` is whether the time limit of a run covers it, and `last` whether it may take all that is left of it.
    """

    name: str
    parts: tuple[Memory, ...]
    work: Work | None = field(default_factory=Work)
    limited: bool = False
    last: bool = False

    def bytes(self, place: Place | None = None) -> int:
        """The bytes of its parts at one place, or in memory."""
        return sum(part.bytes for part in self.parts if part.place == place or (not place and part.place != "disk"))

    def beside(self, others: Iterable[Memory]) -> Stage:
        """The stage with other parts that are held all the time."""
        return replace(self, parts=(*others, *self.parts))
