"""The choice of a pattern for each layer, which has to lose less on held-out data than one pattern for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from permprune.budget.asked import Candidate, name_of
from permprune.budget.sensitivity import layer_costs, show, slopes
from permprune.checkpoints.record import Mix, Point
from permprune.errors import PermpruneError
from permprune.losses.objective import Objective
from permprune.matching.knapsack import cheapest
from permprune.pattern import Pattern
from permprune.permuters.base import Run
from permprune.permuters.iterate import TOLERANCE, Landscape
from permprune.permuters.reconstruction import Reconstruction
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log, track

START = Reconstruction(swaps=3, candidates=1)
"""The search for the orders in which patterns are chosen: that from which the end-to-end searches start."""

EXAMPLES = 8
"""The windows on which the gradient at a uniform pattern is computed."""

ENDS = 1
"""The candidates at both ends that tell nothing of layers, if others are between: the sparsest network has too little
left to lose, and with hardly a weight pruned noise decides."""

POINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares of the weights at which the curve is measured, beside the chosen one and those of uniform patterns."""


@dataclass(frozen=True)
class Costs:
    """What the candidates of each layer take: `kept` weights and `bytes`, int64 (layers, candidates).

    `others` are the bytes of what is not pruned. A choice may keep `limit` weights, or bytes if `by_bytes`.
    """

    candidates: Sequence[Candidate]
    kept: np.ndarray
    bytes: np.ndarray
    weights: int
    others: int
    limit: int
    by_bytes: bool = False

    def choose(self, costs: np.ndarray) -> list[int]:
        """Return the choice of each layer that costs least within the limit. Raises `PermpruneError` if none fits."""
        if not self.by_bytes:
            return cheapest(costs, self.kept, self.limit)
        if (least := self.others + int(self.bytes.min(1).sum())) > self.limit:
            raise PermpruneError(
                f"the packed model takes at least {least / 1e6:,.3f} MB, and the budget is {self.limit / 1e6:,.3f} MB: "
                "give more, or a sparser candidate"
            )
        return cheapest(costs, self.bytes, self.limit - self.others)

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within the limit."""
        size = self.bytes_of(choice) if self.by_bytes else self.kept[np.arange(len(choice)), choice].sum()
        return bool(size <= self.limit)

    def keeping(self, share: float) -> Costs:
        """The same with a limit of this share of the weights."""
        return replace(self, limit=int(share * self.weights + 1e-6), by_bytes=False)

    def share_of(self, choice: Sequence[int]) -> float:
        """The share of the weights that a choice keeps."""
        return float(self.kept[np.arange(len(choice)), choice].sum()) / self.weights

    def bytes_of(self, choice: Sequence[int]) -> int:
        """The bytes of the packed model with a choice."""
        return self.others + int(self.bytes[np.arange(len(choice)), choice].sum())


def differentiated(candidates: int) -> range:
    """The numbers of the candidates at whose uniform patterns gradients are computed."""
    return range(ENDS, candidates - ENDS) if candidates > 2 * ENDS + 1 else range(candidates)


class Sensitivity:
    """What patterns cost the layers of a network, measured once for all budgets; `frame` is that of `candidates`.

    First the orders are found from which a search with the pattern `frame` would start (`frame_of`). In these orders,
    the costs of the candidates are found from uniform patterns (`layer_costs`). Losses are those on the held-out
    examples.
    """

    def __init__(self, network: PrunedNetwork, run: Run, candidates: Sequence[Candidate], frame: Pattern) -> None:
        network.set_patterns(dict.fromkeys(network.layers, frame))
        START.solve(network, replace(run, solved={}))  # no other search starts from this network
        self.landscape, self.candidates = Landscape.of(network, run, Objective()), candidates
        self.uniform = [(number,) * len(network.layers) for number in range(len(candidates))]
        self.measured = dict[tuple[int, ...], float]()
        examples, slopes_of = run.batch(0, EXAMPLES), dict[int, np.ndarray]()
        telling = differentiated(len(candidates))
        for number, choice in track([*enumerate(self.uniform)], "measuring uniform patterns"):
            self.loss(choice)
            if number in telling:
                slopes_of[number] = slopes(network, candidates, examples, self.landscape.loss)
        self.losses = [self.measured[choice] for choice in self.uniform]
        self.changes = layer_costs(slopes_of, self.losses)

    def loss(self, choice: Sequence[int]) -> float:
        """Return the held-out loss of a choice; the network runs with it where it was not measured before."""
        if (key := tuple(choice)) not in self.measured:
            show(self.landscape.network, [self.candidates[number] for number in choice])
            self.measured[key] = self.landscape.held_out_loss()
        return self.measured[key]

    def choose(self, costs: Costs) -> Mix:
        """Return the choice that costs least within the budget, or the densest uniform pattern that fits.

        The latter if it loses less on the held-out examples. Raises `PermpruneError` if the budget is too small.
        """
        candidates, names = self.candidates, [*map(name_of, self.candidates)]
        choice = costs.choose(self.changes)
        loss = self.loss(choice)
        log.info("patterns: held-out loss %.4f with the mix", loss)
        fitting = [number for number, uniform in enumerate(self.uniform) if costs.fits(uniform)]
        if fitting:
            best = min(fitting, key=lambda number: (-costs.share_of(self.uniform[number]), self.losses[number]))
            log.info("patterns: held-out loss %.4f with %s in every layer", self.losses[best], names[best])
            if loss > self.losses[best] - TOLERANCE:
                log.warning("no mix of patterns that was tried loses less than %s in every layer", candidates[best])
                choice, loss = [*self.uniform[best]], self.losses[best]
        curve = self._curve(costs, choice)
        self.landscape = replace(self.landscape)  # without outputs, which take much memory while orders are searched
        chosen = dict(zip(self.landscape.network.layers, (names[number] for number in choice), strict=True))
        uniform = dict(zip(names, self.losses, strict=True))
        return Mix(chosen, costs.share_of(choice), costs.bytes_of(choice), [loss], curve, uniform=uniform)

    def _curve(self, costs: Costs, chosen: Sequence[int]) -> list[Point]:
        """Return the best choices for several shares of the weights, beside the `chosen` one."""
        kept = costs.kept.sum(0) / costs.weights
        shares = [kept.min(), *(share for share in POINTS if kept.min() < share < kept.max()), kept.max()]
        choices = [costs.keeping(share).choose(self.changes) for share in shares]
        different, points = {tuple(choice) for choice in (*choices, chosen)}, []
        for choice in track(sorted(different, key=costs.share_of), "measuring the curve"):
            expected = self.losses[-1] + float(self.changes[np.arange(len(choice)), choice].sum())
            points.append(Point(costs.share_of(choice), costs.bytes_of(choice), expected, self.loss(choice)))
        return points
