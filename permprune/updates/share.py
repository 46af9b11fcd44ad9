"""How much of an update is taken: as much as helps the network, on examples that it does not know."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log
from permprune.updates.base import Update
from permprune.updates.none import NoUpdate

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of an update of the network's own masks that are tried."""


def update_network(update: Update, network: PrunedNetwork, examples: Examples, held_out: Examples) -> None:
    """Make the network show the update whose loss on the `held_out` examples is the least, until orders are next set.

    The loss is that of the searches: beside labels of which each example has one, the divergence counts as well.

    Updates make up for a layer's own error, and masks that were searched end to end rely on what other layers do: all
    of the update may cost them more than it brings. So there is a choice of masks alone, of the update with the masks
    it chooses, and of shares of the way from the network's masked weights to their update. Raises `PermpruneError`
    where there is no update.
    """
    if isinstance(update, NoUpdate):
        return
    objective = Objective().suited(network.task, network.statistics.one_label_per_example)
    teacher_outputs = network.compute_teacher_outputs(held_out, objective)
    least, label, best = float("inf"), "", dict[str, Tensor]()
    for name, weights in _choices(update, network, examples):
        network.show(weights)
        loss = network.loss(held_out, objective, teacher_outputs)
        log.info("%s, %s: held-out loss %.4f", update.name, name, loss)
        if loss < least:
            least, label, best = loss, name, weights
    log.info("%s: took %s", update.name, label)
    network.show(best)


@torch.no_grad()
def _choices(update: Update, network: PrunedNetwork, examples: Examples) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what it is, weights by layer)."""
    masked = {name: (weight * network.masks[name]).float() for name, weight in network.weights.items()}
    yield "masks alone", masked
    update.run(network, examples)
    yield "all of it", dict(network.updated)
    update.run(network, examples, network.masks)
    whole = dict(network.updated)
    for share in SHARES:
        weights = {name: masked[name].lerp(weight, share) for name, weight in whole.items()}
        yield f"{share:.0%} of it with the masks as they were", weights
