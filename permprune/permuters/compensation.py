"""Compensation: what a layer-wise update makes of the orders found, with masks that it chooses itself.

The masks of a search follow from its scores alone. Training the weights that they keep takes thousands of examples to
find what the least squares of each layer give at once, and never finds other masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from permprune.kernels.search.masks import pack_mask, write_mask
from permprune.permuters.iterate import TOLERANCE, Landscape, S
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log
from permprune.updates.admm import ADMM


def compensate(landscape: Landscape, state: S, *, examples: int) -> S:
    """Compensate with `ADMM` for the pruned weights of a network, which shows `state`, if the held-out loss falls.

    The second moments are those of `examples` training examples. Returns the state with the loss on its curve and, if
    it fell, the new weights; the network then shows these, and keeps the masks that were chosen.
    """
    network = landscape.network
    before = network.bits
    with torch.no_grad():
        ADMM().run(network, landscape.run.batch(0, examples))
        updated, kept = network.updated, network.shelf.another()
        network.set_bits(_bits_of(network, updated))  # `updated` is not shown any more
        for name in updated:  # pruned weights keep the values that they had, as in training
            weight = torch.where(network.masks[name], updated[name], network.weights[name])
            kept[name] = weight.to(network.layers[name].stored.dtype)
        network.set_weights(kept)
    loss = landscape.held_out_loss()
    better = loss < state.best - TOLERANCE
    log.info("compensation: held-out loss %.4f, %s", loss, "kept" if better else "rejected")
    state = state.record(loss, better, "compensation")
    if better:
        return replace(state, best=loss, weights=network.trained)
    network.set_weights(state.weights)
    network.set_bits(before)
    return state


def _bits_of(network: PrunedNetwork, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of pruned weights, packed; each group keeps its N largest weights, of which some may be 0."""
    columns, bits = network.stored_columns(), {}
    for name, weight in weights.items():
        mask = torch.zeros_like(weight, dtype=torch.bool)
        write_mask(mask, weight.abs(), columns[name], network.patterns[name])
        bits[name] = pack_mask(mask)
    return bits
