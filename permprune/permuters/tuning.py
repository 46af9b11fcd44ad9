"""Training of the remaining weights between the rounds of a search, or after them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from permprune.losses.loss import Loss
from permprune.permuters.base import Run
from permprune.pruning.network import PrunedNetwork
from permprune.system import distributed

BETAS = (0.9, 0.95)
"""Adam's betas; the second is that of language models, which suits a small number of steps."""

RISING = 0.1
"""The share of the steps in which the learning rate rises from 0."""


def counted(steps: int) -> Iterator[float]:
    """Yield the place of each of `steps` steps in a schedule: its middle, from 0 to 1."""
    return ((step + 0.5) / steps for step in range(steps))


def timed(seconds: float) -> Iterator[float]:
    """Yield the place of each step in a schedule of `seconds` seconds, and end before a step that would exceed them.

    Steps are assumed to take as long as those before them did on average. All ranks get the same places.
    """
    started, step, spent = time.monotonic(), 0, 0.0
    while spent + (each := spent / max(1, step)) < seconds:
        yield (spent + each / 2) / seconds
        step, spent = step + 1, distributed.mean(time.monotonic() - started)


def train_weights(
    network: PrunedNetwork,
    run: Run,
    loss: Loss,
    places: Iterable[float],
    *,
    first: int,
    examples: int,
    rate: float,
) -> dict[str, Tensor]:
    """Train the network's weights with Adam at its current masks, one step for each of `places`; returns them by layer.

    The network itself keeps its weights. Step i uses batch `first` + i of `examples` training examples, at a learning
    rate that rises to `rate` and falls to 0 as the places rise from 0 to 1 (`counted`, `timed`). Pruned weights do not
    change. Adam's moments start from 0 in each call, so that only the weights have to be saved between calls.
    """
    own = network.trained
    weights = {name: weight.clone() for name, weight in network.weights.items()}
    optimizer = torch.optim.Adam(list(weights.values()), betas=BETAS, fused=True)
    for step, place in enumerate(places):
        network.set_weights(weights)
        gradients = network.gradients(run.batch(first + step, examples), loss).weight
        for name, weight in weights.items():
            weight.grad = gradients[name].mul_(network.masks[name]).to(weight)
        optimizer.param_groups[0]["lr"] = rate * min(place / RISING, (1 - place) / (1 - RISING))
        optimizer.step()
    for weight in weights.values():
        weight.grad = None
    network.set_weights(own)
    return weights
