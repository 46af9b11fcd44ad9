"""How sensitive a network's loss is to each layer: the layer's share of what uniform patterns lose.

If all layers go from one candidate to the next sparser one, from weights W to V, the loss rises by the integral of its
gradient along the way, to which each layer adds its own part (integrated gradients: Sundararajan et al. 2017, arXiv
1703.01365, section 3). The trapezoidal rule needs the gradients G at both ends alone:

    dLoss = sum over layers of 1/2 <G(W) + G(V), V - W>

So a layer is judged among others that are pruned like it. Among dense ones it costs a fraction of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from permprune.budget.asked import Candidate
from permprune.examples import Examples
from permprune.kernels.search.masks import kept_sum
from permprune.losses.objective import Loss
from permprune.pruning.network import PrunedNetwork

LEAST = 0.01
"""The least share of a layer in a step, relative to the mean of all layers: less, or a gain, is noise of gradients."""


def show(network: PrunedNetwork, candidates: Sequence[Candidate]) -> None:
    """Let each layer of a network run with its candidate, in the current orders."""
    chosen = zip(network.layers, candidates, strict=True)
    network.set_patterns({name: one for name, one in chosen if one is not None})


def slopes(network: PrunedNetwork, candidates: Sequence[Candidate], examples: Examples, loss: Loss) -> np.ndarray:
    """Return the inner products of each layer's gradient with its weights masked by each candidate.

    The gradient is that of the mean loss over the examples, with the masks that the network shows; the result is fp64
    (layers, candidates).
    """
    columns, products = network.stored_columns(), dict[str, list[float]]()

    def take(name: str, gradient: Tensor) -> None:
        with torch.no_grad():
            weight, slope, score = network.weights[name].float(), gradient.float(), network.scores[name]
            whole = float((weight * slope).sum(dtype=torch.float64))
            products[name] = [
                whole if one is None else kept_sum(score, weight, slope, columns[name], one) for one in candidates
            ]

    network.take_gradients(examples, loss, take)
    return np.array([products[name] for name in network.layers])


def layer_costs(slopes: Mapping[int, np.ndarray], losses: Sequence[float]) -> np.ndarray:
    """Return the loss that each candidate costs each layer, fp64 (layers, candidates); the densest costs nothing.

    `losses` are those of the uniform patterns, from the sparsest candidate to the densest, and `slopes`, by the number
    of the candidate, those of two neighbours or more. A layer's share of the loss differs little from step to step, so
    that it is the mean over the steps between neighbours. A sparser candidate never costs less than a denser one.
    """
    shares = []
    for sparser, denser in itertools.pairwise(sorted(slopes)):
        along = (slopes[sparser] + slopes[denser]) / 2
        rises = along[:, sparser] - along[:, denser]
        rises = np.maximum(rises, LEAST * max(rises.mean(), 1e-12))
        shares.append(rises / rises.sum())
    falling = np.maximum.accumulate(np.array(losses)[::-1] - losses[-1])[::-1]
    costs: np.ndarray = np.mean(shares, axis=0)[:, None] * falling
    return costs
