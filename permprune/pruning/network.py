"""The pruned network: a model whose linear layers have masked weights, for any choice of channel orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.statistics import Statistics
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.losses.objective import Objective, TeacherOutputs
from permprune.losses.targets import Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.forward import frozen
from permprune.models.layers import Layer
from permprune.pattern import Pattern
from permprune.pruning.problem import Orders, Part, Problem
from permprune.saliency.base import Saliency
from permprune.system import distributed
from permprune.system.progress import track

T = TypeVar("T")

COUPLED = 4096
"""Rows of a layer up to which their covariance is kept: 64 MiB."""

SMALL = 1e-6
"""The least Fisher information of a coupled row, as a share of the mean: less is rounding."""


@dataclass(frozen=True)
class Gradients:
    """Of the mean loss of one batch of examples at the present masks, by layer.

    `weight[layer]` is dLoss/dW_eff (rows, channels), W_eff the masked weight; `fisher[layer]` (rows,) that of
    `Statistics`, as the mean over the `count` terms of this loss and times its `curvature`; `loss` the mean loss. Where
    each example has one answer, `covariance[layer]` (rows, rows) is that of the rows (`row_covariance`), whose diagonal
    is `fisher`, of layers of up to `COUPLED` rows.
    """

    weight: dict[str, Tensor]
    fisher: dict[str, Tensor]
    loss: float
    count: int
    covariance: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerMeasure:
    """What its present weights cost a pruned layer.

    `kept` is the share of the squared scores that belongs to weights that are not zero; `error` the relative output
    error on the dense model's inputs, tr(E H E^T) / tr(W H W^T) with E = W - W_eff. `transposed` tells whether the
    weight is stored as (inputs, outputs).
    """

    name: str
    transposed: bool
    pattern: str
    kept: float
    error: float


class PrunedNetwork:
    """A model in its own channel order whose layers hold weight * mask.

    The masks are those of each layer's pattern with its columns in the chosen orders. The network itself stays in its
    own order (Li et al. 2026, "the pruned weight is permuted back"), so that any loss can be computed with it. Other
    weights can be shown instead until orders are next set (`show`).

    `dense` are the original weights by layer, `scores` their saliency, both (rows, channels). `weights` are what the
    masks act on: the dense weights, unless they are trained (`set_weights`); the scores stay those of the dense ones.

    Examples pass in batches of `batch`; with `recompute` gradients take less memory and more time (`recomputed`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        problems: list[Problem],
        sites: dict[str, str],
        statistics: Statistics,
        saliency: Saliency,
        patterns: Mapping[str, Pattern],
        task: Task,
        dtype: torch.dtype = torch.float32,
        batch: int = 4,
        recompute: bool = False,
    ) -> None:
        self.model, self.problems, self.statistics, self.patterns = model, problems, statistics, patterns
        self.layers = {layer.name: layer for layer in layers}
        self.task, self.dtype, self.batch, self.recompute = task, dtype, batch, recompute
        self.dense = {layer.name: layer.weight.clone() for layer in layers}
        self.weights = self.dense
        self.sites = sites
        self.scores = {name: self._score(name, saliency) for name in sites}
        self.masks = {name: patterns[name].mask(score) for name, score in self.scores.items()}
        self.orders: Orders = {}
        self.updated: dict[str, Tensor] = {}
        self._refresh(self.layers)

    def pattern_of(self, problem: Problem) -> Pattern:
        """The pattern of the layers that follow a problem's order, one for all of them."""
        return self.patterns[problem.parts[0].layer]

    def identity(self) -> Orders:
        """The natural order of every problem."""
        return {problem.name: problem.identity() for problem in self.problems}

    def current(self) -> Orders:
        """The orders the network shows."""
        return self.identity() | self.orders

    def each_problem(
        self, solve: Callable[[int, Problem], T], label: str | None, numbers: Sequence[int] | None = None
    ) -> dict[str, T]:
        """`solve(number, problem)` for every problem, by name; a progress bar shows `label` unless it is None.

        Problems are distributed to ranks and threads by size, so that they finish together; `solve` must not change
        the network. Without `numbers` the problems are numbered by their position.
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
        """The columns of each layer in the order in which they will be stored, int64 (channels,).

        The order is that of the present orders: groups of m neighbours follow the layer's pattern, and columns that no
        problem moves keep their positions.
        """
        stored = {name: torch.arange(weight.shape[1]) for name, weight in self.dense.items()}
        orders = self.current()
        for problem in self.problems:
            for part in problem.parts:
                stored[part.layer][part.columns] = part.columns[orders[problem.name]]
        return stored

    def set_orders(self, orders: Orders) -> None:
        """Use the masks of these orders; problems that are left out keep theirs."""
        touched = dict.fromkeys(self.updated)
        self.updated.clear()
        for problem in self.problems:
            order = orders.get(problem.name)
            if order is None or torch.equal(order, self.orders.get(problem.name, problem.identity())):
                continue
            self.orders[problem.name] = order.clone()
            for part in problem.parts:
                self.masks[part.layer][:, part.columns] = self._mask(part, order)
                touched[part.layer] = None
        self._refresh(touched)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Apply the masks to these weights (rows, channels), by layer, and to the dense weights of the other layers."""
        self.weights = self.dense | weights
        self.updated.clear()
        self._refresh(self.layers)

    def slope(self, problem: Problem, before: Tensor, after: Tensor, gradient: dict[str, Tensor]) -> float:
        """The directional derivative of the loss along the step from one order of a problem to another.

        `gradient[layer]` is dLoss/dW_eff (rows, channels). Taken where the step begins, it predicts the change of the
        loss to first order; taken where it ends, it says whether a longer step would gain more.
        """
        total = 0.0
        for part in problem.parts:
            step = self._mask(part, after).float() - self._mask(part, before).float()
            weight, own = (x[part.layer][:, part.columns] for x in (self.weights, gradient))
            total += float((step * weight * own).sum())
        return total

    def show(self, weights: dict[str, Tensor]) -> None:
        """Use these weights (rows, channels), by layer and in the network's own order, until orders are next set."""
        self.updated |= weights
        self._refresh(dict.fromkeys(weights))

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Use the dense weights inside the block."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
        try:
            yield
        finally:
            self._refresh(self.layers)

    def autocast(self, examples: Examples) -> torch.autocast:
        """A context in which activations have the network's dtype."""
        return torch.autocast(examples.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def loss(
        self, examples: Examples, objective: Objective, teacher_outputs: Sequence[TeacherOutputs] | None = None
    ) -> float:
        """The mean loss over `examples` with the present masks, given the teacher outputs if they are needed."""
        total, count = 0.0, 0.0
        with frozen(self.model):
            for part, answers in self._parts(examples, objective, teacher_outputs):
                with self.autocast(part):
                    value, terms = objective(self.model, part, self.task, answers)
                total, count = total + float(value), count + terms
        total, count = distributed.total(total, count)
        return total / count

    def gradients(self, examples: Examples, objective: Objective) -> Gradients:
        """Gradients of the mean loss over `examples` with respect to the present weights."""
        weights = {name: self._parameter(layer) for name, layer in self.layers.items()}
        fisher = {name: self._no_fisher(layer.weight) for name, layer in self.layers.items()}
        total, count = 0.0, 0.0
        parts = self._parts(examples, objective)
        with (
            frozen(self.model),
            output_fisher(list(self.layers.values()), fisher, self.statistics.one_label_per_example),
            recomputed(self.model, self.recompute),
        ):
            for weight in weights.values():
                weight.requires_grad_(True)
            for part, answers in parts:
                with self.autocast(part):
                    value, terms = objective(self.model, part, self.task, answers)
                value.backward()
                total, count = total + float(value.detach()), count + terms
        total, count = distributed.total(total, count)
        distributed.add_(list(fisher.values()))
        slopes = self._collect(weights, bool(parts))
        mean = {name: slope / count for name, slope in slopes.items()}
        fisher = {name: f * objective.curvature / count for name, f in fisher.items()}
        covariance = {name: f for name, f in fisher.items() if f.dim() == 2}
        fisher |= {name: f.diagonal().clamp_min(SMALL * float(f.diagonal().mean())) for name, f in covariance.items()}
        return Gradients(mean, fisher, total / count, int(count), covariance)

    def _no_fisher(self, weight: Tensor) -> Tensor:
        """Zeros for the Fisher information of a weight's rows, (rows,), or for their covariance, (rows, rows)."""
        rows = len(weight)
        return weight.new_zeros((rows, rows) if self.statistics.one_label_per_example and rows <= COUPLED else rows)

    def _collect(self, weights: dict[str, nn.Parameter], asked: bool) -> dict[str, Tensor]:
        """The gradients left in `weights`, (rows, channels), summed over the ranks; those not `asked` have none."""
        found = {}
        for name, weight in weights.items():
            weight.requires_grad_(False)
            if weight.grad is None and asked:
                raise PermpruneError(
                    f"{name} takes no part in the loss: exclude it, or calibrate with inputs that reach it"
                )
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = None
            distributed.add_([gradient])
            found[name] = (gradient.T if self.layers[name].transposed else gradient).float()
        return found

    def measures(self) -> list[LayerMeasure]:
        """What the present weights cost each layer."""
        found = []
        for name, layer in self.layers.items():
            dense, shown, energy = self.dense[name], layer.weight, self.scores[name].square()
            moments = self.statistics.moments[self.sites[name]]
            kept = float((energy * shown.ne(0)).sum() / energy.sum().clamp_min(1e-30))
            error = _output_energy(dense - shown, moments) / max(_output_energy(dense, moments), 1e-30)
            found.append(LayerMeasure(name, layer.transposed, str(self.patterns[name]), kept, error))
        return found

    @torch.no_grad()
    def compute_teacher_outputs(self, examples: Examples, objective: Objective) -> list[TeacherOutputs] | None:
        """The dense model's outputs for this rank's batches of `examples`; None if the objective does not need them."""
        if not objective.needs_teacher(self.task):
            return None
        answers = []
        with frozen(self.model), self.dense_weights():
            for part in self._share(examples):
                with self.autocast(part):
                    answers.append(objective.compute_teacher_outputs(self.model, part, self.task))
        return answers

    def _parts(
        self, examples: Examples, objective: Objective, teacher_outputs: Sequence[TeacherOutputs] | None = None
    ) -> Sequence[tuple[Examples, TeacherOutputs | None]]:
        parts = self._share(examples)
        answers: Sequence[TeacherOutputs | None] = (
            teacher_outputs or self.compute_teacher_outputs(examples, objective) or [None] * len(parts)
        )
        return list(zip(parts, answers, strict=True))

    def _share(self, examples: Examples) -> Sequence[Examples]:
        """The batches of this rank."""
        return distributed.share(batches(examples, self.batch))

    def _mask(self, part: Part, order: Tensor) -> Tensor:
        """The mask of a part's columns when they stand in `order`."""
        return self.patterns[part.layer].mask_in_order(self.scores[part.layer][:, part.columns], order)

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

    @staticmethod
    def _parameter(layer: Layer) -> nn.Parameter:
        return layer.module.weight  # type: ignore[return-value]


def _output_energy(weight: Tensor, moments: Tensor) -> float:
    """Mean squared norm of the outputs of a (rows, channels) weight on inputs with these second moments."""
    return float(((weight.float() @ moments) * weight).sum())
