"""Newton, and its loop, which `learned` shares: gradients, proposals, trial steps, the accept test, and the damping."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

from permprune.options import Count, Natural, Positive
from permprune.permuters.base import Permuter
from permprune.permuters.iterate import TOLERANCE, Iterative, Landscape, SearchState
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.reconstruction import Reconstruction
from permprune.system.imports import on_first_use
from permprune.system.progress import log

with on_first_use(globals()):
    import torch
    from torch import Tensor

    from permprune.pruning.gradients import Gradients
    from permprune.pruning.problem import Problem

ATTEMPTS = 4
"""Largest number of corrections of a step, and of parts of it that are tried before a round is rejected."""

FAR = 0.1
"""A step is much too long if the loss turns before this share of it; also the least share of problems to try first."""

DISCOUNT = 0.7
"""The weight of earlier gradients in the mean is multiplied by this after each step but the first, which is the longest
and forgets them; chosen by ablation, see docs/results/ablations.md."""

LEAST_SLOPE = 1e-5
"""A problem's slopes are treated as noise if the predicted change of the loss is smaller than this, in nats."""

STILL = 1e-3
"""A problem counts as unmoved if its predicted change of the loss is below this share of the mean."""


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


@dataclass(frozen=True)
class TrustRegion(Iterative[TrustRegionState]):
    """Minimise the loss of the pruned network itself, over all orders at once.

    A round computes the gradient of the loss with respect to the masked weights on the next `examples` examples, calls
    `propose` for new orders that lower the quadratic model (see `quadratic`), and keeps them if the loss on held-out
    examples falls. If it does not fall, the new orders of a random part of the problems are tried. The size of the part
    is first given by the parabola through the slope and the loss of the whole step, and then halved each time.
    Gradients are averaged over rounds; the weight of earlier ones falls after each step (see `DISCOUNT`).

    All problems move together, which the block-diagonal model does not account for. Its curvature is therefore
    multiplied by a damping for each problem, which starts at `damping` and is adapted to the outcome of the steps. A
    step that was much too long is corrected at once and repeated.

    `objective` is the loss: an `Objective`, which is adapted to the data, or a function of model and batch. `start`
    finds the orders for the first round, which are used if they are better than the natural ones.
    """

    free: ClassVar[tuple[str, ...]] = ("rounds",)
    state: ClassVar[type[SearchState]] = TrustRegionState
    start: Permuter = Reconstruction(swaps=3, candidates=1)
    rounds: Natural = 16
    examples: Count = 8
    damping: Positive = 15.0

    @abstractmethod
    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Move channels so that the model falls.

        `memory` is what this method returned for the problem's last proposal that was kept; the return value replaces
        it if this proposal is kept.
        """

    @property
    def divides_rows(self) -> bool:
        return self.start.divides_rows

    @property
    def uses_fisher(self) -> bool:
        return self.start.uses_fisher

    @property
    def total(self) -> int:
        return self.rounds

    def init(self, landscape: Landscape) -> TrustRegionState:
        """Start from the orders of `start`, or from the natural ones if their held-out loss is lower."""
        network, start = landscape.network, self.start.solve(landscape.network, landscape.run)
        best, orders = landscape.better_of(start.orders, self.start.name), network.orders
        state = TrustRegionState(
            orders=orders,
            best=best,
            seconds=start.seconds,
            damping={problem.name: self.damping for problem in network.problems},
            visits=(Visit(orders),),
        )
        return state.record(best, kept=True)

    def step(self, landscape: Landscape, state: TrustRegionState) -> TrustRegionState:
        """Propose new orders and keep those that lower the held-out loss."""
        network = landscape.network
        network.set_orders(state.orders)
        gradients = self.gradients(landscape, state)
        visits = (*state.visits[:-1], Visit(state.orders, (*state.visits[-1].rounds, state.number)))
        if state.slopes:
            ends = network.slopes_along(state.visits[-2].orders, state.orders, gradients.weight)
            state = replace(state, damping=damping_after_slopes(state.damping, state.slopes, ends, kept=True))
        trial = self.trial(landscape, state, gradients)
        loss, moved = accepted_part(landscape, state, trial)
        kept = loss < state.best - TOLERANCE
        damping = damping_after_trial(trial, moved, kept, loss - state.best)
        result = f"{len(moved)} of {len(trial.proposals)} orders moved" if kept else "rejected"
        message = "%s round %d: held-out loss %.4f, %s; median damping %.1f"
        log.info(message, self.name, state.number, loss, result, median(damping.values()))
        state = state.record(loss, kept, number=state.number + 1, damping=damping)
        if not kept:
            network.set_orders(state.orders)
            landscape.mean = visits, gradients
            return replace(state, moved=0, slopes={}, visits=visits)
        orders = network.orders
        visits = (*visits, Visit(orders))
        landscape.mean = visits, gradients.discounted(_discount(len(visits) - 1))
        memory = {name: new for name in moved if (new := trial.proposals[name].memory) is not None}
        return replace(
            state,
            orders=orders,
            best=loss,
            moved=len(moved),
            visits=visits,
            slopes={name: trial.slopes[name] for name in moved},
            memory=state.memory | memory,
        )

    def gradients(self, landscape: Landscape, state: TrustRegionState) -> Gradients:
        """Return the mean of the gradient over this round's examples and of earlier gradients (see `DISCOUNT`).

        The landscape has the mean of the earlier ones, unless the search was interrupted; then they are computed again.
        """
        (visits, mean), landscape.mean = landscape.mean or (None, None), None
        if visits is not state.visits:
            mean = None
            for steps, visit in enumerate(state.visits):
                landscape.network.set_orders(visit.orders)
                mean = mean and mean.discounted(_discount(steps))
                for number in visit.rounds:
                    mean = landscape.gradients(number, self.examples, mean)
        return landscape.gradients(state.number, self.examples, mean)

    def trial(self, landscape: Landscape, state: TrustRegionState, gradients: Gradients) -> Trial:
        """Make the step of the proposals for all problems, and measure the loss at its end.

        If the loss turns before a tenth of the step, and the slope at the end is positive too, the models are far off.
        Then the damping of each problem is raised according to that slope, and new proposals are made and tried.
        """
        network, run, before = landscape.network, landscape.run, state.orders
        for attempt in range(ATTEMPTS):
            proposals, damping = self.proposals(landscape, state, gradients)
            orders = {name: proposal.order for name, proposal in proposals.items()}
            slopes = network.slopes_along(before, orders, gradients.weight)
            network.set_orders(orders)
            loss, slope = landscape.held_out_loss(), sum(slopes.values())
            if attempt == ATTEMPTS - 1 or slope > -TOLERANCE or turning_point(slope, loss - state.best) >= FAR:
                break
            ends = network.slopes(run.batch(state.number, self.examples), landscape.loss, before, orders)
            if sum(ends.values()) <= 0:
                break
            state = replace(state, damping=damping_after_slopes(damping, slopes, ends, kept=False))
            log.info("%s: held-out loss %.4f, the step was too long: raising the damping", self.name, loss)
            network.set_orders(before)
        return Trial(proposals, slopes, loss, damping)

    def proposals(
        self, landscape: Landscape, state: TrustRegionState, gradients: Gradients
    ) -> tuple[dict[str, Proposal], dict[str, float]]:
        """Return a proposal for each problem, and the damping of their models.

        If together they predict that the loss falls by more than the loss itself, they are repeated with more damping.
        """
        network, run, damping = landscape.network, landscape.run, state.damping

        def propose(number: int, problem: Problem) -> Proposal:
            factor, covariance = damping[problem.name], gradients.covariance
            model = QuadraticModel.of(
                network, problem, gradients.fisher, gradients.weight, factor, covariance=covariance
            )
            memory = self.propose(model, state.memory.get(problem.name), run.generator(state.number, 2, number))
            return Proposal(model.order, model.change, memory)

        proposals = network.each_problem(propose, self.name)
        for _ in range(ATTEMPTS):
            excess = -sum(proposal.predicted_change for proposal in proposals.values()) / max(state.best, TOLERANCE)
            if excess <= 1:
                break
            log.info("%s predicts a gain of %.1f times the loss: raising the damping", self.name, excess)
            damping = {name: factor * max(2.0, excess) for name, factor in damping.items()}
            proposals = network.each_problem(propose, self.name)
        return proposals, damping


@dataclass(frozen=True)
class Newton(TrustRegion):
    """End-to-end search by swaps: in each round every group of channels makes up to `swaps` swaps.

    Swaps are chosen with the damped quadratic model of the loss; those that lower it most come first.
    """

    name: ClassVar[str] = "newton"
    swaps: Natural = 4

    def propose(self, model: QuadraticModel, memory: Tensor | None, generator: torch.Generator) -> Tensor | None:
        model.swap(generator, self.swaps)
        return memory


def accepted_part(landscape: Landscape, state: TrustRegionState, trial: Trial) -> tuple[float, list[str]]:
    """Search a part of a step that lowers the held-out loss; returns the loss and the names of the problems that move.

    The network has the orders of the last part that was tried, which does not lower the loss if none does.
    """
    network, proposals, loss = landscape.network, trial.proposals, trial.loss
    shuffled = torch.randperm(len(network.problems), generator=landscape.run.generator(state.number, 1))
    names = moved = [network.problems[i].name for i in shuffled]
    share = min(0.6, max(FAR, turning_point(sum(trial.slopes.values()), loss - state.best)))
    for _ in range(ATTEMPTS - 1):
        if loss < state.best - TOLERANCE or len(moved) == 1:
            break
        moved = names[: max(1, round(share * len(names)))]
        network.set_orders({name: proposals[name].order if name in moved else state.orders[name] for name in names})
        loss = landscape.held_out_loss()
        share /= 2
    return loss, moved


def turning_point(slope: float, change: float) -> float:
    """Return where a parabola is least that starts at 0 with slope `slope` and is `change` at the end, at 1."""
    return slope / (2 * min(slope - change, -1e-9))


def damping_after_slopes(
    damping: Mapping[str, float], starts: Mapping[str, float], ends: Mapping[str, float], *, kept: bool
) -> dict[str, float]:
    """Adapt the damping to the slopes at both ends of each problem's step.

    A positive slope at the end means that the step was too long, a negative one that it was too short. If the slope is
    s at the start and r * s at the end, the minimum of the parabola is at 1 / (1 - r) of the step. The damping is
    multiplied by only the square root of 1 - r, between 0.5 and 2, because the slopes are noisy. After a step that was
    not kept, because it was much too long, it is multiplied by all of 1 - r, at least by 1.
    """
    adapted = dict(damping)
    for name, start in starts.items():
        if start < -LEAST_SLOPE:
            length = 1 - ends[name] / start
            adapted[name] *= min(2.0, max(0.5, max(0.0, length) ** 0.5)) if kept else max(1.0, length)
    return adapted


def damping_after_trial(trial: Trial, moved: list[str], kept: bool, change: float) -> dict[str, float]:
    """Raise the damping if all or part of the step was rejected, and lower it if the model predicted well.

    `change` is the measured change of the loss for the problems in `moved`, and `kept` is whether they keep their new
    orders. The damping of a problem whose predicted change is negligible (see `STILL`) is always lowered.
    """
    predicted = {name: proposal.predicted_change for name, proposal in trial.proposals.items()}
    ratio = change / min(-1e-12, sum(predicted[name] for name in moved))
    if not kept:
        factor = 1.6
    elif len(moved) < len(predicted):
        factor = 1.3
    else:
        factor = 0.8 if ratio > 0.5 else 1.0 if ratio > 0.2 else 1.2
    mean = sum(predicted.values()) / len(predicted)
    return {name: old * (0.7 if predicted[name] >= STILL * mean else factor) for name, old in trial.damping.items()}


def _discount(steps: int) -> float:
    """Return the factor of the mean's weight after so many steps since the weights last changed."""
    return DISCOUNT if steps > 1 else 0.0
