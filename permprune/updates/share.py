"""How much of a weight update is applied: the share with the lowest loss on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log
from permprune.updates.base import NoUpdate, Update

SHARES = (0.25, 0.5, 0.75, 1.0)
"""The shares that are tried of an update that keeps the network's masks."""


def update_network(update: Update, network: PrunedNetwork, examples: Examples, held_out: Examples) -> None:
    """Update the network's weights, as far as this lowers the loss on the `held_out` examples.

    The loss is that of the searches; if each example has one label, it includes the divergence.

    An update reduces each layer's own output error. Masks that were searched end to end, however, rely on the errors of
    other layers, so that a full update can raise the loss. The candidates are therefore the masks alone, the update
    with masks that it chooses itself, and several shares of the way from the masked weights to an update that keeps the
    masks. The network then uses the best candidate (`MaskedLayers.show`). Raises `PermpruneError` if no update can be
    computed.
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
    log.info("%s: selected %s", update.name, label)
    network.show(best)


@torch.no_grad()
def _choices(update: Update, network: PrunedNetwork, examples: Examples) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the candidates: (label, weights by layer)."""
    masked = {name: (weight * network.masks[name]).float() for name, weight in network.weights.items()}
    yield "masks alone", masked
    update.run(network, examples)
    yield "full update", dict(network.updated)
    update.run(network, examples, network.masks)
    whole = dict(network.updated)
    for share in SHARES:
        weights = {name: masked[name].lerp(weight.float(), share) for name, weight in whole.items()}
        yield f"{share:.0%} of the update with fixed masks", weights
