"""A model whose linear layers have masked weights, for any choice of channel orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.kernels.search import kept_sum, write_mask
from permprune.models.layers import Layer
from permprune.pattern import Pattern
from permprune.pruning.problem import Orders, Problem
from permprune.saliency.base import Saliency
from permprune.system import distributed
from permprune.system.progress import track
from permprune.system.resources import Held

T = TypeVar("T")


@dataclass(frozen=True)
class LayerMeasure:
    """How close a pruned layer with its current weights is to the dense one.

    `kept` is the share of the squared scores that belongs to non-zero weights; `error` is the relative output error on
    the dense model's inputs, tr(E H E^T) / tr(W H W^T) with E = W - W_eff. `transposed` is whether the weight is stored
    as (inputs, outputs).
    """

    name: str
    transposed: bool
    pattern: str
    kept: float
    error: float


class MaskedLayers:
    """Layers that hold weight * mask, in the model's own channel order.

    The masks follow each layer's pattern with its columns in the chosen orders. The layers themselves stay in their own
    order (Li et al. 2026, "the pruned weight is permuted back"), so that any loss can be computed with them. `show`
    replaces the masked weights until orders or weights are set again.

    `dense` are the original weights by layer and `scores` their saliency, both (rows, channels). `weights` are the
    weights that are masked: the dense ones, unless others are set (`set_weights`); the scores remain those of the dense
    weights. `sites` maps each layer to the name of the tensor that it reads. Raises `PermpruneError` for a layer that
    cannot be scored.
    """

    def __init__(
        self,
        layers: list[Layer],
        problems: list[Problem],
        sites: dict[str, str],
        *,
        statistics: Statistics,
        saliency: Saliency,
        patterns: Mapping[str, Pattern],
    ) -> None:
        self.problems, self.sites, self.statistics, self.patterns = problems, sites, statistics, patterns
        self.layers = {layer.name: layer for layer in layers}
        self.dense = {layer.name: layer.weight.clone() for layer in layers}
        self.weights = self.dense
        self.scores = {name: self._score(name, saliency) for name in sites}
        self.masks = {name: patterns[name].mask(score) for name, score in self.scores.items()}
        self.orders: Orders = {}
        self.updated: dict[str, Tensor] = {}
        self._refresh(self.layers)

    def pattern_of(self, problem: Problem) -> Pattern:
        """The pattern of the layers that follow a problem's order; it is the same for all of them."""
        return self.patterns[problem.parts[0].layer]

    def identity(self) -> Orders:
        """The natural order of every problem."""
        return {problem.name: problem.identity() for problem in self.problems}

    def current(self) -> Orders:
        """The current order of every problem."""
        return self.identity() | self.orders

    def each_problem(
        self, solve: Callable[[int, Problem], T], label: str | None, numbers: Sequence[int] | None = None
    ) -> dict[str, T]:
        """Call `solve(number, problem)` for every problem and return the results by name.

        The problems are distributed over ranks and threads, the largest first, to balance the load; every rank gets all
        results. `solve` must not change the network. `numbers` are by default the positions of the problems. A progress
        bar shows `label` unless it is None.
        """

        def weights(numbered: tuple[int, Problem]) -> int:
            problem = numbered[1]
            return -problem.size * sum(len(self.dense[part.layer]) for part in problem.parts)

        numbered = zip(numbers or range(len(self.problems)), self.problems, strict=True)
        mine = distributed.share(sorted(numbered, key=weights))
        found = distributed.each(lambda pair: solve(*pair), mine, next(iter(self.dense.values())).device)
        shown = track(found, label, len(mine)) if label else found
        return distributed.merge({problem.name: solved for (_, problem), solved in zip(mine, shown, strict=True)})

    def stored_columns(self) -> dict[str, Tensor]:
        """Return each layer's columns in the order in which they will be stored, int64 (channels,).

        This is given by the current orders: groups of m neighbours follow the layer's pattern, and columns that no
        problem moves keep their positions.
        """
        stored = {name: torch.arange(weight.shape[1]) for name, weight in self.dense.items()}
        orders = self.current()
        for problem in self.problems:
            for part in problem.parts:
                stored[part.layer][part.columns] = part.columns[orders[problem.name]]
        return stored

    def set_orders(self, orders: Orders) -> None:
        """Apply the masks of these orders; problems that are not in `orders` keep their current order."""
        touched = dict.fromkeys(self.updated)
        self.updated.clear()
        for problem in self.problems:
            order = orders.get(problem.name)
            if order is None or torch.equal(order, self.orders.get(problem.name, problem.identity())):
                continue
            self.orders[problem.name] = order.clone()
            for part in problem.parts:
                columns, pattern = part.columns[order], self.patterns[part.layer]
                write_mask(self.masks[part.layer], self.scores[part.layer], columns, pattern)
                touched[part.layer] = None
        self._refresh(touched)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Apply the masks to these weights (rows, channels), by layer, and to the dense weights of the other layers."""
        self.weights = self.dense | weights
        self.updated.clear()
        self._refresh(self.layers)

    def slope(self, problem: Problem, before: Tensor, after: Tensor, gradient: dict[str, Tensor]) -> float:
        """Return the directional derivative of the loss along the step from one order of a problem to another.

        `gradient[layer]` is dLoss/dW_eff (rows, channels). With the gradient at the start of the step, the result is
        the first-order prediction of the change of the loss. With the gradient at its end, a negative result means that
        a longer step would lower the loss further, a positive one that the step was too long.
        """
        total = 0.0
        for part in problem.parts:
            score, weight, own = (x[part.layer] for x in (self.scores, self.weights, gradient))
            ends = [
                kept_sum(score, weight, own, part.columns[order], self.patterns[part.layer])
                for order in (before, after)
            ]
            total += ends[1] - ends[0]
        return total

    def show(self, weights: dict[str, Tensor]) -> None:
        """Use these weights without masking them, until orders or weights are set again.

        They are (rows, channels) in the network's own order, by layer; other layers keep their current weights.
        """
        self.updated |= weights
        self._refresh(dict.fromkeys(weights))

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Return a context manager inside which the layers have their dense weights."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
        try:
            yield
        finally:
            self._refresh(self.layers)

    def restore(self) -> None:
        """Put the dense weights back into the model; the network must not be used afterwards."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])

    def measures(self) -> list[LayerMeasure]:
        """Compare each layer with its current weights to the dense layer."""
        found = []
        for name, layer in self.layers.items():
            dense, shown, energy = self.dense[name], layer.weight, self.scores[name].square()
            moments = self.statistics.moments[self.sites[name]]
            kept = float((energy * shown.ne(0)).sum() / energy.sum().clamp_min(1e-30))
            error = _output_energy(dense - shown, moments) / max(_output_energy(dense, moments), 1e-30)
            found.append(LayerMeasure(name, layer.transposed, str(self.patterns[name]), kept, error))
        return found

    def _score(self, name: str, saliency: Saliency) -> Tensor:
        try:
            return saliency.score(self.dense[name], self.statistics.moments[self.sites[name]])
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error

    def _refresh(self, names: dict[str, Layer] | dict[str, None]) -> None:
        for name in names:
            if name in self.updated:
                self.layers[name].weight.copy_(self.updated[name])
            else:
                torch.mul(self.weights[name], self.masks[name], out=self.layers[name].weight)


def masked_parts(weights: int) -> list[Held]:
    """Return what `MaskedLayers` holds for this number of weights, beside the layers' own."""
    return [Held("dense weights", 4 * weights), Held("scores", 4 * weights), Held("masks", weights)]


def _output_energy(weight: Tensor, moments: Tensor) -> float:
    """Return the mean squared norm of a layer's outputs, tr(W H W^T).

    `weight` is (rows, channels), and `moments` are the second moments of its inputs, (channels, channels).
    """
    return float(((weight.float() @ moments) * weight).sum())
