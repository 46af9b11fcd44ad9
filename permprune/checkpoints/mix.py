"""How the patterns of a mix were chosen, as the record has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from permprune.options import Range, Share
from permprune.pattern import DENSE, Pattern

Bytes = Annotated[int, Range(0, 10**15)]
Value = Annotated[float, Range(-1e300, 1e300)]


@dataclass(frozen=True)
class Point:
    """A choice of patterns: the share of the weights and the bytes that it keeps, and its loss on held-out data.

    `expected` is the loss according to the model at the chosen patterns, and `measured` the loss; both are before the
    search.
    """

    keep: Share
    bytes: Bytes
    expected: Value
    measured: Value


@dataclass(frozen=True)
class Attempt:
    """A run of the search for the fewest weights within a loss: the share of the weights, and what was measured.

    `chosen` is the metric on the data for the choice, and `confirmed` that on the data for the result, which are looked
    at if the first is within the limit; else it is None.
    """

    keep: Share
    chosen: Value
    confirmed: Value | None = None


@dataclass(frozen=True)
class Mix:
    """The pattern of each layer, or `DENSE`, and what was found on the way.

    `keep` and `bytes` are the share of the weights and the bytes of the packed model that the choice keeps. `rounds`
    are the held-out losses of the choice, the last one that of the result, and `curve` has other choices, from few
    weights to all. `attempts` are those of a limit of the loss. `uniform` has the held-out loss of each candidate, by
    its name, if all layers have it. All these losses are before the search.
    """

    layers: dict[str, str]
    keep: Share
    bytes: Bytes
    rounds: list[Value]
    curve: list[Point]
    attempts: list[Attempt] = field(default_factory=list)
    uniform: dict[str, Value] = field(default_factory=dict)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the layers that do not stay dense."""
        return {name: Pattern.parse(text) for name, text in self.layers.items() if text != DENSE}
