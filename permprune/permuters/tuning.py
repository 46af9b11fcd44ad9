"""Training of the remaining weights between the rounds of a search."""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.losses.loss import Loss
from permprune.permuters.base import Run
from permprune.pruning.network import PrunedNetwork

BETAS = (0.9, 0.95)
"""Adam's betas; the second is that of language models, which suits a small number of steps."""

RISING = 0.25
"""The share of the steps in which the learning rate rises from 0."""


def train_weights(
    network: PrunedNetwork, run: Run, loss: Loss, *, first: int, steps: int, examples: int, rate: float
) -> dict[str, Tensor]:
    """Train the network's weights for `steps` steps of Adam at its current masks; returns them by layer.

    The network itself keeps its weights. Step i uses batch `first` + i of `examples` training examples, at a learning
    rate that rises to `rate` and falls to 0. Pruned weights do not change. Adam's moments start from 0 in each call, so
    that only the weights have to be saved between calls.
    """
    own = network.trained
    weights = {name: weight.clone() for name, weight in network.weights.items()}
    optimizer = torch.optim.Adam(list(weights.values()), betas=BETAS, fused=True)
    for step in range(steps):
        network.set_weights(weights)
        gradients = network.gradients(run.batch(first + step, examples), loss).weight
        for name, weight in weights.items():
            weight.grad = gradients[name].mul_(network.masks[name]).to(weight)
        place = (step + 0.5) / steps
        optimizer.param_groups[0]["lr"] = rate * min(place / RISING, (1 - place) / (1 - RISING))
        optimizer.step()
    for weight in weights.values():
        weight.grad = None
    network.set_weights(own)
    return weights
