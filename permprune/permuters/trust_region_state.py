"""The state of a trust region between two steps, and what a step tries."""

from __future__ import annotations

from dataclasses import dataclass, field

from permprune.permuters.iterate import SearchState
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visit:
    """Orders at which gradients were computed, and the rounds whose examples they were computed on."""

    orders: dict[str, Tensor]
    rounds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrustRegionState(SearchState):
    """The state of a `TrustRegion` search.

    Attributes:
        damping: A factor on the curvature of each problem's quadratic model; a larger one makes shorter steps.
        visits: The orders so far, with the rounds of each; the last are the current ones.
        slopes: If the last step was kept, the slopes of the loss along it at its start, by problem that moved.
        memory: What the proposals of each problem pass from round to round.
    """

    damping: dict[str, float]
    visits: tuple[Visit, ...]
    slopes: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A new order of a problem, the change of the loss that its model predicts, and the memory to store if kept."""

    order: Tensor
    predicted_change: float
    memory: Tensor | None


@dataclass(frozen=True)
class Trial:
    """A step of all problems, which the network shows.

    `slopes` are those of the loss along the step at its start, by problem; `loss` is the held-out loss at its end, and
    `damping` that of the models that proposed the step.
    """

    proposals: dict[str, Proposal]
    slopes: dict[str, float]
    loss: float
    damping: dict[str, float]
