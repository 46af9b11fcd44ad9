"""The choice of a pattern for each layer: by the model of `sensitivity`, refined by an accept test on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from permprune.budget.asked import Candidate, name_of
from permprune.budget.knapsack import cheapest
from permprune.budget.sensitivity import Sensitivity
from permprune.checkpoints.mix import Mix, Point
from permprune.errors import PermpruneError
from permprune.losses.objective import Objective
from permprune.pattern import Pattern
from permprune.permuters.base import Run
from permprune.permuters.iterate import TOLERANCE, Landscape
from permprune.permuters.reconstruction import Reconstruction
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log, track

START = Reconstruction(swaps=3, candidates=1)
"""The search for the orders in which patterns are chosen: that from which the end-to-end searches start."""

ROUNDS = 4
"""The most rounds, each of which computes a gradient and tries other choices."""

EXAMPLES = 8
"""The windows of the gradient of a round."""

ATTEMPTS = 3
"""The choices that are tried in a round, each with `EASING` times the damping of the one before."""

EASING = 4.0

POINTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares of the weights at which the curve is measured, beside the chosen one and that of the dense model."""


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
                f"the packed model takes at least {least / 1e6:,.1f} MB, and the budget is {self.limit / 1e6:,.1f} MB: "
                "give more, or a sparser candidate"
            )
        return cheapest(costs, self.bytes, self.limit - self.others)

    def keeping(self, share: float) -> Costs:
        """The same with a limit of this share of the weights."""
        return replace(self, limit=int(share * self.weights), by_bytes=False)

    def share_of(self, choice: Sequence[int]) -> float:
        """The share of the weights that a choice keeps."""
        return float(self.kept[np.arange(len(choice)), choice].sum()) / self.weights

    def bytes_of(self, choice: Sequence[int]) -> int:
        """The bytes of the packed model with a choice."""
        return self.others + int(self.bytes[np.arange(len(choice)), choice].sum())


def allocate(network: PrunedNetwork, run: Run, costs: Costs, frame: Pattern) -> Mix:
    """Choose a candidate for each layer of a network; `frame` is that of the candidates (`frame_of`).

    First the orders are found from which a search with the pattern `frame` would start. The first choice is that of the
    least loss in a second-order model around the dense weights. Then rounds follow: the end-to-end model at the current
    choice proposes another one, which is kept if the loss on the held-out examples falls; if not, the damping is
    raised, so that fewer layers change. Every choice is the best one within the budget according to its model. At the
    end the network shows the chosen patterns. Raises `PermpruneError` if the budget is too small.
    """
    network.set_patterns(dict.fromkeys(network.layers, frame))
    START.solve(network, replace(run, solved={}))  # no other search starts from this network
    return _Choosing(Landscape.of(network, run, Objective()), costs).chosen()


class _Choosing:
    """The rounds of `allocate`: `choice` is the candidate of each layer, and `best` its held-out loss."""

    def __init__(self, landscape: Landscape, costs: Costs) -> None:
        self.landscape, self.costs, self.names = landscape, costs, list(landscape.network.layers)
        with landscape.network.dense_weights():
            self.dense = landscape.held_out_loss()
        self.model = Sensitivity(landscape.network, costs.candidates)
        self.choice = costs.choose(self.model.curvature.diagonal(axis1=1, axis2=2) / 2)
        self.best = self.show(self.choice)
        log.info("patterns: held-out loss %.4f by the errors of layers, %.4f dense", self.best, self.dense)

    def show(self, choice: Sequence[int]) -> float:
        """Let the network run with a choice; returns its held-out loss."""
        chosen = zip(self.names, (self.costs.candidates[number] for number in choice), strict=True)
        self.landscape.network.set_patterns({name: one for name, one in chosen if one is not None})
        return self.landscape.held_out_loss()

    def chosen(self) -> Mix:
        losses = [self.best]
        for number in range(ROUNDS + 1):
            self.model.differentiate(self.landscape.run.batch(number, EXAMPLES), self.landscape.loss)
            damping = self.model.damping_to(self.choice, self.dense - self.best)
            if number == ROUNDS or not self._improve(damping):
                break
            log.info("patterns, round %d: held-out loss %.4f, damping %.1f", number, self.best, damping)
            losses.append(self.best)
        curve = self._curve(self.model.costs(self.choice, damping))
        self.show(self.choice)
        chosen = [name_of(self.costs.candidates[number]) for number in self.choice]
        kept, size = self.costs.share_of(self.choice), self.costs.bytes_of(self.choice)
        return Mix(dict(zip(self.names, chosen, strict=True)), kept, size, losses, curve)

    def _improve(self, damping: float) -> bool:
        """Take the choice that the model proposes, with more and more damping, if its held-out loss is lower."""
        for _ in range(ATTEMPTS):
            tried = self.costs.choose(self.model.costs(self.choice, damping))
            if tried == self.choice:
                break
            loss = self.show(tried)
            if loss < self.best - TOLERANCE:
                self.choice, self.best = tried, loss
                return True
            damping *= EASING
        self.show(self.choice)
        return False

    def _curve(self, changes: np.ndarray) -> list[Point]:
        """Return the best choices for several shares of the weights; `changes` are those of the loss by candidates."""
        kept = self.costs.kept.sum(0) / self.costs.weights
        shares = [kept.min(), *(share for share in POINTS if kept.min() < share < kept.max()), kept.max()]
        choices = [self.costs.keeping(share).choose(changes) for share in shares]
        different, points = {tuple(choice) for choice in (*choices, self.choice)}, []
        for choice in track(sorted(different, key=self.costs.share_of), "measuring the curve"):
            expected = self.best + float(changes[np.arange(len(choice)), choice].sum())
            measured = self.best if choice == tuple(self.choice) else self.show(choice)
            points.append(Point(self.costs.share_of(choice), self.costs.bytes_of(choice), expected, measured))
        return points
