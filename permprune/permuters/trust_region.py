"""End-to-end search in a trust region: its options, and its forecast."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from permprune.options import Count, Natural, Positive, Share
from permprune.permuters.base import Permuter, Run, each_problem_work
from permprune.permuters.iterate import Iterative, Search
from permprune.permuters.quadratic import QuadraticModel, model_bytes
from permprune.permuters.reconstruction import Reconstruction
from permprune.system.imports import on_first_use
from permprune.system.resources import Held, Stage, Work

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.permuters.trust_region_search import TrustRegionSearch
    from permprune.permuters.tuning import training_parts
    from permprune.pruning.network import PrunedNetwork, gradient_bytes
    from permprune.pruning.outline import Outline, Passes, activation_parts

TRIED = 1.5
"""Mean number of held-out losses in a round, for forecasts: most steps are accepted or halved once."""

TRIED_SHARES = 3
"""The same in a round of refinement."""


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

    def state_bytes(self, outline: Outline) -> int:
        weights = outline.dtype.itemsize * outline.weights if self.tune or self.train else 0
        training = weights + 2 * weights * outline.pattern.n // outline.pattern.m  # and two moments of kept ones
        masks = outline.weights // 8 if self.refine else 0
        orders = 8 * sum(problem.size for problem in outline.problems) * self.rounds
        states = 2 * (orders + weights + masks + training)  # the old one is kept until the new one is written
        return super().state_bytes(outline) + states + weights + masks  # and the solution

    @abstractmethod
    def proposal_work(self, channels: int, rows: int, m: int) -> Work:
        """Return the work of `propose` for a problem of `channels` channels and `rows` weight rows."""

    def model_bytes(self, outline: Outline, threads: int) -> int:
        """Return the bytes that the models of the largest problems hold (`quadratic.model_bytes`)."""
        return model_bytes(outline, threads, outline.dtype)

    def stages(self, outline: Outline, passes: Passes, threads: int) -> list[Stage]:
        start = self.start.stages(outline, passes, threads)
        examples, own = self.examples * passes.examples_per_window, gradient_bytes(outline, passes.dtype)
        gradient, model = Held("gradients", own), self.model_bytes(outline, threads)

        def stage(what: str, *parts: Held, work: Work, times: int = self.rounds) -> Stage:
            return Stage(f"{self.name}: {what}", (*parts, gradient), work * times)

        backward = (*self.teacher_parts(passes, examples), *activation_parts(passes.gradient))
        if passes.dtype == torch.float32 and not passes.recompute:
            # until the backward pass; of other types, `passes` counts them
            backward += (Held("masked weights", 4 * outline.weights),)
        accept = (*self.teacher_parts(passes, 0), *activation_parts(passes.loss))
        rounds = [
            stage("gradients", *backward, work=passes.gradient_work(examples)),
            stage(
                "proposals",
                Held("largest problem's model", model),
                work=each_problem_work(outline, self.proposal_work),
            ),
            stage("accept", *accept, work=passes.loss_work(passes.held_out) * TRIED),
        ]
        batch = max(1, examples // 4)
        training = (*training_parts(outline, passes, batch), *self.teacher_parts(passes, batch, training=True))
        if not self.rounds:
            rounds = []
        elif self.tune:
            trained_rounds = max(0, self.rounds - self.wait)
            step = passes.gradient_work(batch) + passes.loss_work(batch)  # of the dense model, for the divergence
            best = Held("best trained weights", outline.dtype.itemsize * outline.weights)
            rounds.append(stage("training", *training, best, work=step * (self.tune * trained_rounds / self.rounds)))
        if self.refine:
            work = passes.gradient_work(2 * examples) + passes.loss_work(passes.held_out) * TRIED_SHARES
            rounds.append(stage("refinement", *backward, work=work, times=self.refine))
        if self.train:
            rounds.append(Stage(f"{self.name}: training at the end", training, None))
        return [*start, *rounds]
