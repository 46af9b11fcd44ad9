"""How much of a weight update is applied: the share with the lowest loss on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log
from permprune.system.shelf import Computed
from permprune.updates.base import Update
from permprune.updates.methods import NoUpdate

SHARES = (0.25, 0.5, 0.75, 1.0)
"""The shares that are tried of an update that keeps the network's masks."""


@torch.no_grad()
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
    least, label = float("inf"), ""
    best: Mapping[str, Tensor] = {}
    for name, weights in _choices(update, network, examples):
        network.show(weights)
        loss = network.loss(held_out, objective, teacher_outputs)
        log.info("%s, %s: held-out loss %.4f", update.name, name, loss)
        if loss < least:
            least, label, best = loss, name, weights
    log.info("%s: selected %s", update.name, label)
    network.show(best)


def _choices(update: Update, network: PrunedNetwork, examples: Examples) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the candidates: (label, weights by layer), which what is shown later leaves as they are.

    Only updated weights are in memory; the others are computed from them and the masked ones, layer by layer.
    """

    def masked(name: str) -> Tensor:
        return (network.weights[name] * network.masks[name]).float()

    yield "masks alone", Computed(network.layers, masked)
    update.run(network, examples)
    yield "full update", network.updated
    update.run(network, examples, network.masks)
    whole = network.updated
    network.show(whole)  # on its shelf, where the shares do not replace it

    def part(share: float, name: str) -> Tensor:
        return masked(name).lerp(whole[name].float(), share)

    for share in SHARES:
        yield f"{share:.0%} of the update with fixed masks", Computed(whole, partial(part, share))
