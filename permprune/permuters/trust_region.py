"""End-to-end search in a trust region: its options."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from permprune.options import Count, Natural, Positive, Share
from permprune.permuters.base import Permuter, Run
from permprune.permuters.iterate import Iterative, Search
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.reconstruction import Reconstruction
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.permuters.trust_region_search import TrustRegionSearch
    from permprune.pruning.network import PrunedNetwork


@dataclass(frozen=True)
class TrustRegion(Iterative):
    """Minimise the loss of the pruned network itself, over all orders at once.

    A round computes the gradient of the loss with respect to the masked weights on the next `examples` examples, calls
    `propose` for new orders that lower the quadratic model (see `quadratic`), and keeps them if the loss on held-out
    examples falls. If it does not fall, the new orders of a random part of the problems are tried. The size of the part
    is first given by the parabola through the slope and the loss of the whole step, and then halved each time.
    Gradients are averaged over rounds; the weight of earlier ones falls after each step (see `DISCOUNT`).

    All problems move together, which the block-diagonal model does not account for. Its curvature is therefore
    multiplied by a damping for each problem, which starts at `damping` and is adapted to the outcome of the steps (see
    `Damping`). A step that was much too long is corrected at once and repeated.

    `objective` is the loss: an `Objective`, which is adapted to the data, or a function of model and batch. `start`
    finds the orders for the first round, which are used if they are better than the natural ones.

    With `tune` orders and weights are optimised jointly. After each round but the first `wait`, the remaining weights
    are trained for `tune` steps (see `train_weights`) of a quarter as many examples, on the objective and the KL
    divergence from the dense model. The learning rate `rate`, which is relative to the weights of a layer, is halved
    whenever the held-out loss does not fall. Pruned weights keep their values, so that a later order can restore them.

    With `refine` as many rounds follow in which masks change at the orders found (see `refinement`); each takes its
    gradient on twice as many examples.

    With `train` the remaining weights are trained once, in the same way, after the last round and until the time limit
    of the run is over: `train` is the share of that limit in which no round begins.
    """

    free: ClassVar[tuple[str, ...]] = ("rounds", "refine", "train")
    start: Permuter = Reconstruction(swaps=3, candidates=1)
    rounds: Natural = 16
    examples: Count = 8
    damping: Positive = 15.0
    tune: Natural = 0
    wait: Natural = 0
    refine: Natural = 0
    train: Share = 0.0
    rate: Positive = 2e-3

    @abstractmethod
    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Move channels so that the model falls.

        `memory` is what this method returned for the problem's last proposal that was kept; the return value replaces
        it if this proposal is kept.
        """

    @property
    def divides_rows(self) -> bool:
        return not (self.tune or self.train or self.refine) and self.start.divides_rows

    @property
    def total(self) -> int:
        return self.rounds

    @property
    def searching(self) -> float:
        return 1 - self.train

    def begin(self, network: PrunedNetwork, run: Run) -> Search:
        self.require_minutes(run.minutes)
        return TrustRegionSearch(self, network, run)
