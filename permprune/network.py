"""The pruned network: a model whose linears show their masked weights, for any choice of channel orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permprune.calibrate import Statistics, frozen, output_fisher
from permprune.errors import PermpruneError
from permprune.layers import Layer
from permprune.losses import Objective, Task, Taught
from permprune.pattern import Pattern
from permprune.problem import Orders, Problem
from permprune.saliency import Saliency


@dataclass(frozen=True)
class Gradients:
    """Of the mean loss of one batch of tokens at the present masks, by layer.

    `weight[layer]` is dLoss/dW_eff (rows, channels), W_eff the masked weight; `fisher[layer]` the mean over tokens
    of the squared output gradient (rows,); `loss` the mean loss; `count` the number of its terms.
    """

    weight: dict[str, Tensor]
    fisher: dict[str, Tensor]
    loss: float
    count: int


class PrunedNetwork:
    """A model in its own channel order whose layers hold weight * mask.

    The masks are those the pattern leaves when each layer's columns stand in the chosen orders; the network itself
    stays in its own order (Li et al. 2026, "the pruned weight is permuted back"), so that any loss can be taken
    through it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        problems: list[Problem],
        sites: dict[str, str],
        statistics: Statistics,
        saliency: Saliency,
        pattern: Pattern,
        task: Task,
        dtype: torch.dtype = torch.float32,
        batch: int = 4,
    ) -> None:
        self.model, self.problems, self.statistics, self.pattern = model, problems, statistics, pattern
        self.layers = {layer.name: layer for layer in layers}
        self.task, self.dtype, self.batch = task, dtype, batch
        self.dense = {layer.name: layer.weight.clone() for layer in layers}
        self.sites = sites
        self.scores = {name: saliency.score(self.dense[name], statistics.norm(site)) for name, site in sites.items()}
        self.masks = {name: pattern.mask(score) for name, score in self.scores.items()}
        self.orders: Orders = {}
        self._show(self.layers)

    def identity(self) -> Orders:
        """The natural order of every problem."""
        return {problem.name: problem.identity() for problem in self.problems}

    def current(self) -> Orders:
        """The orders the network shows."""
        return self.identity() | self.orders

    def set_orders(self, orders: Orders) -> None:
        """Make the network show the masks of these orders; problems left out keep theirs."""
        touched: dict[str, None] = {}
        for problem in self.problems:
            order = orders.get(problem.name)
            if order is None or torch.equal(order, self.orders.get(problem.name, problem.identity())):
                continue
            self.orders[problem.name] = order.clone()
            for part in problem.parts:
                columns = part.columns[order]
                self.masks[part.layer][:, columns] = self.pattern.mask(self.scores[part.layer][:, columns])
                touched[part.layer] = None
        self._show(touched)

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Show the dense weights inside."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Show the weights of the present masks again, whatever was written into the layers."""
        self._show(self.layers)

    @torch.inference_mode()
    def loss(self, windows: Tensor, objective: Objective, taught: Sequence[Taught] | None = None) -> float:
        """Mean loss over `windows` (count, length) at the present masks; `taught` is what `teach` gave for them."""
        total, count = 0.0, 0
        with frozen(self.model):
            for part, answers in self._parts(windows, objective, taught):
                with self._autocast(part):
                    value, terms = objective(self.model, part, self.task, answers)
                total, count = total + float(value), count + terms
        return total / count

    def gradients(self, windows: Tensor, objective: Objective, taught: Sequence[Taught] | None = None) -> Gradients:
        """Gradients of the mean loss over `windows` (count, length) at the weights shown.

        `taught` is what `teach` gave for them; without it the dense model is asked, after which the network shows the
        weights of its masks.
        """
        weights = {name: self._parameter(layer) for name, layer in self.layers.items()}
        fisher = {name: layer.weight.new_zeros(len(layer.weight)) for name, layer in self.layers.items()}
        total, count = 0.0, 0
        parts = self._parts(windows, objective, taught)
        with frozen(self.model), output_fisher(list(self.layers.values()), fisher):
            for weight in weights.values():
                weight.requires_grad_(True)
            for part, answers in parts:
                with self._autocast(part):
                    value, terms = objective(self.model, part, self.task, answers)
                value.backward()
                total, count = total + float(value.detach()), count + terms
        found = {}
        for name, weight in weights.items():
            weight.requires_grad_(False)
            if weight.grad is None:
                raise PermpruneError(
                    f"{name} takes no part in the loss: exclude it, or calibrate with inputs that reach it"
                )
            gradient = weight.grad.T if self.layers[name].transposed else weight.grad
            found[name] = gradient.float() / count
            weight.grad = None
        return Gradients(found, {name: f / count for name, f in fisher.items()}, total / count, count)

    def measures(self) -> list[dict[str, Any]]:
        """For each layer the share of squared score kept and the relative output error, tr(E H E^T) / tr(W H W^T).

        "kept_none" and "error_none" are those of the natural order.
        """
        found = []
        for name, score in self.scores.items():
            energy, moments = score.square(), self.statistics.moments[self.sites[name]]
            dense = _output_energy(self.dense[name], moments)
            row: dict[str, Any] = {"name": name, "transposed": self.layers[name].transposed}
            for suffix, mask in (("_none", self.pattern.mask(score)), ("", self.masks[name])):
                row[f"kept{suffix}"] = float((energy * mask).sum() / energy.sum().clamp_min(1e-30))
                row[f"error{suffix}"] = _output_energy(self.dense[name] * ~mask, moments) / max(dense, 1e-30)
            found.append(row)
        return found

    @torch.no_grad()
    def teach(self, windows: Tensor, objective: Objective) -> list[Taught] | None:
        """What the dense model says of `windows` (count, length), batch by batch; None where nothing is asked."""
        if not objective.taught:
            return None
        answers = []
        with frozen(self.model), self.dense_weights():
            for part in windows.split(self.batch):
                with self._autocast(part):
                    answers.append(objective.teach(self.model, part, self.task))
        return answers

    def _parts(
        self, windows: Tensor, objective: Objective, taught: Sequence[Taught] | None = None
    ) -> Sequence[tuple[Tensor, Taught | None]]:
        parts = windows.split(self.batch)
        answers: Sequence[Taught | None] = taught or self.teach(windows, objective) or [None] * len(parts)
        return list(zip(parts, answers, strict=True))

    def _autocast(self, part: Tensor) -> torch.autocast:
        return torch.autocast(part.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _show(self, names: dict[str, Layer] | dict[str, None]) -> None:
        for name in names:
            torch.mul(self.dense[name], self.masks[name], out=self.layers[name].weight)

    @staticmethod
    def _parameter(layer: Layer) -> nn.Parameter:
        return layer.module.weight  # type: ignore[return-value]


def _output_energy(weight: Tensor, moments: Tensor) -> float:
    """Mean squared norm of the outputs of a (rows, channels) weight on inputs with these second moments."""
    return float(((weight.float() @ moments) * weight).sum())
