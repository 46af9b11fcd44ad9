"""The state of a search in a trust region: gradients, steps and their corrections, refinement and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permprune.permuters.base import TRAINING, WEIGHT, Run, Solution
from permprune.permuters.damping import Damping, turning_point
from permprune.permuters.iterate import Search
from permprune.permuters.quadratic import QuadraticModel
from permprune.permuters.refinement import refine_masks
from permprune.permuters.tuning import Schedule, counted, timed, train_weights
from permprune.pruning.network import Gradients, PrunedNetwork
from permprune.pruning.problem import Orders, Problem
from permprune.system.progress import log
from permprune.system.search_state import Resumable

if TYPE_CHECKING:
    from permprune.permuters.trust_region import TrustRegion

TOLERANCE = 1e-4
"""The held-out loss must fall by more than this, in nats, for a round to be kept."""

ATTEMPTS = 4
"""Largest number of corrections of a step, and of parts of it that are tried before a round is rejected."""

FAR = 0.1
"""A step is much too long if the loss turns before this share of it; also the least share of problems to try first."""

MEMORY, PAST = "memory/", "past/"
"""Prefixes, among the tensors of a state, of the memory of proposals and of the orders before each step."""

DISCOUNT = 0.7
"""The weight of earlier gradients in the mean is multiplied by this after each step but the first, which is the longest
and forgets them.

Held-out loss of SmolLM2-135M, 2:4, after two and six rounds, seeds 0 to 2: 4.880, 5.097, 5.236 and 4.645, 4.772, 4.926.
If the first step does not forget them, 5.016, 5.222, 5.361 and 4.608, 4.755, 4.919; if all steps do, 4.880, 5.097,
5.236 and 4.714, 4.803, 4.993.
"""


@dataclass(frozen=True)
class Proposal:
    """A new order of a problem, the change of the loss that its model predicts, and the memory to store if kept."""

    order: Tensor
    change: float
    memory: Tensor | None


@dataclass(frozen=True)
class Past:
    """Orders before a step that was kept, and the rounds whose gradients were computed at them."""

    orders: Orders
    rounds: list[int]


class TrustRegionSearch(Search):
    """The state of a `TrustRegion` search.

    `mean` is the mean of all gradients since the weights last changed, if it is in memory: those at the orders before
    each kept step, in `past`, and those of the rounds `pending`, which were rejected at the current orders. If the last
    step was kept, `slopes` are the slopes of the loss along it at its start, by problem. `memory` is what the proposals
    of each problem pass from round to round, and `rate` is the learning rate of `tune`. During the training of a round
    `moved` is the number of orders that the round changed.
    """

    def __init__(self, method: TrustRegion, network: PrunedNetwork, run: Run) -> None:
        super().__init__(method, network, run)
        self.method = method
        self.damping = Damping({problem.name: method.damping for problem in network.problems})
        self.rate = method.rate
        self.past: list[Past] = []
        self.pending: list[int] = []
        self.slopes: dict[str, float] = {}
        self.memory: dict[str, Tensor] = {}
        self.mean: Gradients | None = None
        self.moved: int | None = None

    def start(self) -> None:
        """Start from the orders of `start`, or from the natural ones if their held-out loss is lower."""
        name, network = self.name, self.network
        found = self.method.start.solve(network, self.run)
        loss = self.held_out_loss()
        network.set_orders(network.identity())
        natural = self.held_out_loss()
        if natural < loss:
            log.info(
                "%s starts in natural order: loss %.4f, %.4f after %s",
                name,
                natural,
                loss,
                self.method.start.name,
            )
        else:
            network.set_orders(found.orders)
        self.best, self.seconds = min(natural, loss), found.seconds
        self.record(self.best, kept=True)

    def step(self) -> int:
        if self.moved is None:
            gradients = self._gradients()
            moved = self._move(gradients)
            self.mean = gradients.discounted(self._discount(len(self.past))) if moved else gradients
            if not self.method.tune or self.done <= self.method.wait:
                return moved
            self.moved = moved
            self.save()
        moved, self.moved = self.moved, None
        if self._tune():
            self.mean = None
        return moved

    @property
    def midway(self) -> bool:
        return self.moved is not None

    @property
    def limit(self) -> float:
        return super().limit * self.method.searching

    def finish(self) -> None:
        if self.method.refine:
            self._refine()
        if self.method.train:
            self.mean = None
            self._keep_weights(self._trained(timed(super().limit - self.seconds), first=0))
            self.count_seconds()

    def end(self) -> Solution:
        bits = self.network.bits if self.method.refine else {}
        return Solution(self.network.current(), self.seconds, tuple(self.curve), self.network.trained, bits)

    def tensors(self) -> dict[str, Tensor]:
        found = self.network.current()
        found |= {MEMORY + name: value for name, value in self.memory.items()}
        for number, past in enumerate(self.past):
            found |= {f"{PAST}{number}/{name}": order.clone() for name, order in past.orders.items()}
        found |= {WEIGHT + name: weight for name, weight in self.network.trained.items()}
        return found

    def values(self) -> dict[str, Any]:
        past = [past.rounds for past in self.past]
        return {
            "damping": self.damping.of,
            "rate": self.rate,
            "past": past,
            "pending": self.pending,
            "slopes": self.slopes,
            "moved": self.moved,
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.memory, weights = named(MEMORY), named(WEIGHT)
        network = self.network
        network.set_weights({name: weight.to(network.layers[name].weight) for name, weight in weights.items()})
        network.set_orders(dict(tensors))
        self.damping, self.rate = Damping(values["damping"]), values["rate"]
        self.past = [Past(named(f"{PAST}{number}/"), rounds) for number, rounds in enumerate(values["past"])]
        self.pending, self.slopes, self.moved = values["pending"], values["slopes"], values["moved"]

    def _gradients(self) -> Gradients:
        """Return the mean of the gradient over this round's examples and of earlier gradients (see `DISCOUNT`)."""
        mean = self.mean or self._earlier_gradients()
        return self._gradients_of(self.done, mean)

    def _earlier_gradients(self) -> Gradients | None:
        """Compute the mean of earlier gradients again, which a resumed search lacks."""
        mean = None
        for steps, shown in enumerate([*self.past, Past(self.network.current(), self.pending)]):
            self.network.set_orders(shown.orders)
            mean = mean and mean.discounted(self._discount(steps))
            for number in shown.rounds:
                mean = self._gradients_of(number, mean)
        return mean

    @staticmethod
    def _discount(steps: int) -> float:
        """What the weight of the mean is multiplied by after so many steps since the weights last changed."""
        return DISCOUNT if steps > 1 else 0.0

    def _gradients_of(self, number: int, mean: Gradients | None) -> Gradients:
        return self.network.gradients(self.run.batch(number, self.method.examples), self.loss, mean)

    def _move(self, gradients: Gradients) -> int:
        """Propose new orders and keep those that lower the held-out loss; returns how many were kept."""
        before = self.network.current()
        if self.slopes:
            self.damping.follow_slopes(self.slopes, self._slopes(self.past[-1].orders, before, gradients))
        proposals, slopes, loss = self._step(gradients)
        loss, moved = self._parts(before, proposals, slope=sum(slopes.values()), loss=loss)
        kept = loss < self.best - TOLERANCE
        predicted = {name: proposal.change for name, proposal in proposals.items()}
        self.damping.follow_loss(predicted, moved, kept, loss - self.best)
        self.pending.append(self.done)
        self.slopes = {name: slopes[name] for name in moved} if kept else {}
        if kept:
            self.best = loss
            self.past.append(Past(before, self.pending))
            self.pending = []
            self.memory |= {name: memory for name in moved if (memory := proposals[name].memory) is not None}
        else:
            self.network.set_orders(before)
        self.record(loss, kept)
        result = f"{len(moved)} of {len(proposals)} orders moved" if kept else "rejected"
        log.info(
            "%s round %d: held-out loss %.4f, %s; median damping %.1f",
            *(self.name, self.done, loss, result, self.damping.typical),
        )
        self.done += 1
        return len(moved) if kept else 0

    def _refine(self) -> None:
        """Refine the masks (see `refine_masks`) until the time for the search is over."""
        rounds, examples, before, self.mean = self.method.refine, 2 * self.method.examples, self.seconds, None
        found = refine_masks(
            *(self.network, self.run, self.loss, self.held_out_loss, self.best),
            rounds=rounds,
            examples=examples,
            saved=Resumable(self.checkpoint, f"{self.name}.refinement", self.done),
        )
        while self.seconds <= self.limit and (done := next(found, None)) is not None:
            loss, seconds = done
            self.seconds = before + seconds
            self.record(loss, loss < self.best, "refinement")
            self.best = loss
        self.wait()

    def _tune(self) -> bool:
        """Train for `tune` steps; returns whether the trained weights were kept, and halves the rate if not."""
        steps = self.method.tune
        kept = self._keep_weights(self._trained(counted(steps), first=(self.done - 1) * steps))
        if not kept:
            self.rate /= 2
        return kept

    def _trained(self, schedule: Schedule, *, first: int) -> dict[str, Tensor]:
        """Return the remaining weights after training them (see `train_weights`)."""
        examples, loss = max(1, self.method.examples // 4), self.loss.for_training(self.network.task)
        saved = Resumable(self.checkpoint, self.name + TRAINING, len(self.curve))  # each training follows more points
        self.seconds += saved.before
        return train_weights(
            *(self.network, self.run, loss, schedule), first=first, examples=examples, rate=self.rate, saved=saved
        )

    def _keep_weights(self, trained: dict[str, Tensor]) -> bool:
        """Give the network trained weights, and keep them if the held-out loss falls; returns whether it does."""
        network = self.network
        before = network.trained
        network.set_weights(trained)
        loss = self.held_out_loss()
        kept = loss < self.best - TOLERANCE
        if kept:
            self.best, self.past, self.pending, self.slopes = loss, [], [], {}
        else:
            network.set_weights(before)
        self.record(loss, kept, "training")
        result = "kept" if kept else "rejected"
        log.info("%s: held-out loss %.4f after training, %s", self.name, loss, result)
        return kept

    def _proposals(self, gradients: Gradients) -> dict[str, Proposal]:
        """Return a proposal for each problem.

        If together they predict that the loss falls by more than the loss itself, they are repeated with more damping.
        """

        def propose() -> dict[str, Proposal]:
            return self.network.each_problem(
                lambda number, problem: self._proposal(gradients, number, problem), self.name
            )

        proposals = propose()
        for _ in range(ATTEMPTS):
            excess = -sum(proposal.change for proposal in proposals.values()) / max(self.best, TOLERANCE)
            if excess <= 1:
                break
            log.info("%s predicts a gain of %.1f times the loss: raising the damping", self.name, excess)
            self.damping.raise_all(max(2.0, excess))
            proposals = propose()
        return proposals

    def _proposal(self, gradients: Gradients, number: int, problem: Problem) -> Proposal:
        model = QuadraticModel.of(
            self.network,
            problem,
            gradients.fisher,
            gradients.weight,
            self.damping.of[problem.name],
            covariance=gradients.covariance,
        )
        generator = self.run.generator(self.done, 2, number)
        memory = self.method.propose(model, self.memory.get(problem.name), generator)
        return Proposal(model.order, model.change, memory)

    def _step(self, gradients: Gradients) -> tuple[dict[str, Proposal], dict[str, float], float]:
        """Apply proposals for all problems; returns them, their slopes by problem, and the held-out loss.

        If the loss turns before a tenth of the step, and the slope at the end is positive too, the models are far off.
        Then the damping of each problem is raised according to that slope, and new proposals are made and applied.
        """
        before = self.network.current()
        for attempt in range(ATTEMPTS):
            proposals = self._proposals(gradients)
            orders = {name: proposal.order for name, proposal in proposals.items()}
            slopes = self._slopes(before, orders, gradients)
            self.network.set_orders(orders)
            loss, slope = self.held_out_loss(), sum(slopes.values())
            if attempt == ATTEMPTS - 1 or slope > -TOLERANCE or turning_point(slope, loss - self.best) >= FAR:
                break
            batch = self.run.batch(self.done, self.method.examples)
            ends = self.network.slopes(batch, self.loss, before, orders)
            if sum(ends.values()) <= 0:
                break
            self.damping.shorten(slopes, ends)
            log.info("%s: held-out loss %.4f, the step was too long: raising the damping", self.name, loss)
            self.network.set_orders(before)
        return proposals, slopes, loss

    def _parts(
        self, before: Orders, proposals: dict[str, Proposal], *, slope: float, loss: float
    ) -> tuple[float, list[str]]:
        """Search a part of the proposals that lowers the held-out loss; returns the loss and the names of the problems.

        `slope` is the slope of the loss along the step of all proposals, and `loss` the held-out loss at its end.
        Afterwards the network has the orders of the last part that was tried.
        """
        problems = self.network.problems
        shuffled = torch.randperm(len(problems), generator=self.run.generator(self.done, 1))
        names = moved = [problems[i].name for i in shuffled]
        share = min(0.6, max(FAR, turning_point(slope, loss - self.best)))
        for _ in range(ATTEMPTS - 1):
            if loss < self.best - TOLERANCE or len(moved) == 1:
                break
            moved = names[: max(1, round(share * len(names)))]
            orders = {name: proposals[name].order if name in moved else before[name] for name in names}
            self.network.set_orders(orders)
            loss = self.held_out_loss()
            share /= 2
        return loss, moved

    def _slopes(self, before: Orders, after: Orders, gradients: Gradients) -> dict[str, float]:
        """Return the slope of the loss along the step from one set of orders to another, by problem.

        See `MaskedLayers.slope`.
        """
        return self.network.each_problem(
            lambda _, problem: self.network.slope(problem, before[problem.name], after[problem.name], gradients.weight),
            None,
        )
