"""What each candidate would cost a network's loss, layer by layer: an end-to-end model of first and second order.

Let W_p be a layer's weights with the mask of candidate p, in the network's current orders, and E_p = W - W_p what p
prunes. A layer that goes from candidate c to candidate p changes the loss by about

    dLoss = <G, W_p - W_c> + damping / 2 * tr(F (E_p - E_c) H (E_p - E_c)^T)

with G the gradient of the loss with respect to the masked weights of the network as it is, so that it knows of what all
other layers have lost, H the second moments of the layer's inputs, and F the diagonal of its output's Fisher
information. A damping above 1 accounts for the curvature between layers that change together, as in `quadratic`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from permprune.budget.asked import Candidate
from permprune.examples import Examples
from permprune.kernels.search.masks import kept_sum
from permprune.losses.objective import Loss
from permprune.pruning.network import PrunedNetwork

ROWS = 256
"""The most rows of a layer whose curvature is computed; they stand for all, evenly spread."""


UNDECIDED = 0.01
"""The share of the layers' own errors that is added to their costs, which decides between equal ones."""


class Sensitivity:
    """The end-to-end model of a network in its current orders, by layer in the network's order.

    `candidates` are sorted, the sparsest first.

    `curvature` is fp64 (layers, candidates, candidates): tr(F E_p H E_q^T). `slopes`, fp64 (layers, candidates), are
    the inner products <G, W_p>, and `whole`, (layers,), those with the dense weights; they are 0 until `differentiate`
    is called.
    """

    def __init__(self, network: PrunedNetwork, candidates: Sequence[Candidate]) -> None:
        self.network, self.candidates = network, candidates
        self.columns = network.stored_columns()
        self.curvature = np.stack([self._curvature(name).numpy() for name in network.layers])
        self.slopes, self.whole = np.zeros(self.curvature.shape[:2]), np.zeros(len(self.curvature))

    def differentiate(self, examples: Examples, loss: Loss) -> None:
        """Compute the slopes at the masks that the network shows, on these examples."""
        numbers = {name: number for number, name in enumerate(self.network.layers)}

        def take(name: str, gradient: Tensor) -> None:
            with torch.no_grad():
                self._differentiate(numbers[name], name, gradient)

        self.network.take_gradients(examples, loss, take)

    def costs(self, current: Sequence[int], damping: float) -> np.ndarray:
        """Return the change of the loss by each candidate of a layer, fp64 (layers, candidates).

        `current` are the candidates that the network shows, at which the slopes were computed. A denser candidate never
        costs more than a sparser one: where it seems to, the slopes are noise, and the layer's own error decides.
        """
        every, now = np.arange(len(current)), np.array(current)
        linear = self.slopes - self.slopes[every, now][:, None]
        own = self.curvature.diagonal(axis1=1, axis2=2)
        away = own - 2 * self.curvature[every, now] + own[every, now][:, None]
        changes: np.ndarray = np.minimum.accumulate(linear + damping / 2 * away, axis=1)
        return changes + UNDECIDED * own / 2

    def damping_to(self, current: Sequence[int], change: float) -> float:
        """Return the damping with which the model has the right `change` of the loss if all layers become dense.

        That change is known, and the damping then accounts for the curvature between layers. It is at least 1.
        """
        every, now = np.arange(len(current)), np.array(current)
        linear, away = (self.whole - self.slopes[every, now]).sum(), self.curvature[every, now, now].sum()
        return max(1.0, float(2 * (change - linear) / max(away, 1e-30)))

    @torch.no_grad()
    def _curvature(self, name: str) -> Tensor:
        """Return tr(F E_p H E_q^T) of a layer, fp64 (candidates, candidates)."""
        network, statistics = self.network, self.network.statistics
        moments, weight = statistics.moments[network.sites[name]], network.dense[name].float()
        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long().to(weight.device)
        root = statistics.fisher[name].sqrt()[:, None].to(weight.device)
        pruned = []
        for candidate in self.candidates:
            mask = network.mask_with(name, candidate, self.columns[name])
            pruned.append(weight[rows] * ~mask[rows] * root[rows])
        products = [error @ moments for error in pruned]
        pairs = [[float((one * other).sum()) for other in pruned] for one in products]
        share = float(statistics.fisher[name].sum() / statistics.fisher[name][rows].sum().clamp_min(1e-30))
        found = torch.tensor(pairs, dtype=torch.float64) * share
        return (found + found.T) / 2

    def _differentiate(self, number: int, name: str, gradient: Tensor) -> None:
        network = self.network
        weight, slope, score = network.weights[name].float(), gradient.float(), network.scores[name]
        self.whole[number] = whole = float((weight * slope).sum(dtype=torch.float64))
        self.slopes[number] = [
            whole if candidate is None else kept_sum(score, weight, slope, self.columns[name], candidate)
            for candidate in self.candidates
        ]
