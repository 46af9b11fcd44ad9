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
from permprune.losses import Loss, block_outputs, layer_distance
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
    through it. Other weights can be shown in their place until orders are next set (`show`).
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
        loss: Loss,
        dtype: torch.dtype = torch.float32,
        batch: int = 4,
    ) -> None:
        self.model, self.problems, self.statistics, self.pattern = model, problems, statistics, pattern
        self.layers = {layer.name: layer for layer in layers}
        self.loss_function, self.dtype, self.batch = loss, dtype, batch
        self.dense = {layer.name: layer.weight.clone() for layer in layers}
        self.sites = sites
        self.scores = {name: saliency.score(self.dense[name], statistics.norm(site)) for name, site in sites.items()}
        self.masks = {name: pattern.mask(score) for name, score in self.scores.items()}
        self.orders: Orders = {}
        self.updated: dict[str, Tensor] = {}
        self._refresh(self.layers)

    def identity(self) -> Orders:
        """The natural order of every problem."""
        return {problem.name: problem.identity() for problem in self.problems}

    def current(self) -> Orders:
        """The orders the network shows."""
        return self.identity() | self.orders

    def stored_columns(self) -> dict[str, Tensor]:
        """For each layer its columns in the order in which they will be stored, int64 (channels,), by present orders.

        Groups of m neighbours there are those of the pattern; columns that no problem moves keep their places.
        """
        stored = {name: torch.arange(weight.shape[1]) for name, weight in self.dense.items()}
        orders = self.current()
        for problem in self.problems:
            for part in problem.parts:
                stored[part.layer][part.columns] = part.columns[orders[problem.name]]
        return stored

    def set_orders(self, orders: Orders) -> None:
        """Make the network show the masks of these orders; problems left out keep theirs."""
        touched = dict.fromkeys(self.updated)
        self.updated.clear()
        for problem in self.problems:
            order = orders.get(problem.name)
            if order is None or torch.equal(order, self.orders.get(problem.name, problem.identity())):
                continue
            self.orders[problem.name] = order.clone()
            for part in problem.parts:
                columns = part.columns[order]
                self.masks[part.layer][:, columns] = self.pattern.mask(self.scores[part.layer][:, columns])
                touched[part.layer] = None
        self._refresh(touched)

    def show(self, weights: dict[str, Tensor]) -> None:
        """Show these weights (rows, channels), by layer and in the network's own order, until orders are next set."""
        self.updated |= weights
        self._refresh(dict.fromkeys(weights))

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Show the dense weights inside."""
        for name, layer in self.layers.items():
            layer.weight.copy_(self.dense[name])
        try:
            yield
        finally:
            self._refresh(self.layers)

    def autocast(self, windows: Tensor) -> torch.autocast:
        """The context in which activations have the network's type."""
        return torch.autocast(windows.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def loss(self, windows: Tensor) -> float:
        """Mean loss over `windows` (count, length) at the present masks."""
        total, count = 0.0, 0
        with frozen(self.model):
            for part in windows.split(self.batch):
                with self.autocast(part):
                    value, terms = self.loss_function(self.model, part)
                total, count = total + float(value), count + terms
        return total / count

    def gradients(self, windows: Tensor, distillation: float = 0.0) -> Gradients:
        """Gradients of the mean loss over `windows` (count, length) at the present masks.

        With `distillation` the loss also has that multiple of the Smooth-L1 distance of every block's output to the
        dense model's, summed over channels and blocks (Li et al. 2026, "loss").
        """
        parts = windows.split(self.batch)
        taught = self._dense_outputs(parts) if distillation else [None] * len(parts)
        weights = {name: self._parameter(layer) for name, layer in self.layers.items()}
        fisher = {name: layer.weight.new_zeros(len(layer.weight)) for name, layer in self.layers.items()}
        total, count = 0.0, 0
        with frozen(self.model), output_fisher(list(self.layers.values()), fisher):
            for weight in weights.values():
                weight.requires_grad_(True)
            for part, teacher in zip(parts, taught, strict=True):
                with self.autocast(part), block_outputs(self.model) as outputs:
                    value, terms = self.loss_function(self.model, part)
                if teacher is not None:
                    value = value + distillation * layer_distance(outputs, teacher)
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
        """What the weights shown cost each layer, by name.

        "kept" is the share of the squared score whose weights are not zero, "error" the relative output error on the
        dense model's inputs, tr(E H E^T) / tr(W H W^T) with E = W - W_eff.
        """
        found = []
        for name, layer in self.layers.items():
            dense, shown, energy = self.dense[name], layer.weight, self.scores[name].square()
            moments = self.statistics.moments[self.sites[name]]
            kept = float((energy * shown.ne(0)).sum() / energy.sum().clamp_min(1e-30))
            error = _output_energy(dense - shown, moments) / max(_output_energy(dense, moments), 1e-30)
            found.append({"name": name, "transposed": layer.transposed, "kept": kept, "error": error})
        return found

    @torch.no_grad()
    def _dense_outputs(self, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        taught = []
        with frozen(self.model), self.dense_weights():
            for part in parts:
                with self.autocast(part), block_outputs(self.model) as outputs:
                    self.loss_function(self.model, part)
                taught.append(outputs)
        return taught

    def _refresh(self, names: dict[str, Layer] | dict[str, None]) -> None:
        for name in names:
            if name in self.updated:
                self.layers[name].weight.copy_(self.updated[name])
            else:
                torch.mul(self.dense[name], self.masks[name], out=self.layers[name].weight)

    @staticmethod
    def _parameter(layer: Layer) -> nn.Parameter:
        return layer.module.weight  # type: ignore[return-value]


def _output_energy(weight: Tensor, moments: Tensor) -> float:
    """Mean squared norm of the outputs of a (rows, channels) weight on inputs with these second moments."""
    return float(((weight.float() @ moments) * weight).sum())
