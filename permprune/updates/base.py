"""The interface of weight updates, and the block-by-block pass that layer-wise updates share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from permprune.errors import PermpruneError
from permprune.options import require_fields
from permprune.pattern import Pattern
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from permprune.calibration.moments import InputMoments
    from permprune.examples import Examples
    from permprune.kernels.search.masks import pack_mask, write_mask
    from permprune.models.forward import frozen, padding_of
    from permprune.models.hooks import Done, block_by_block
    from permprune.models.layers import Layer
    from permprune.pruning.network import PrunedNetwork
    from permprune.system import distributed
    from permprune.system.progress import log
    from permprune.system.search_state import Checkpoint, Resumable, State
    from permprune.system.shelf import Computed, Shelf


@dataclass(frozen=True)
class Update(ABC):
    """Changes the remaining weights, given a network's channel orders, to compensate for the pruned ones."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def run(
        self, network: PrunedNetwork, examples: Examples, *, saved: Resumable | None = None, limit: float = math.inf
    ) -> None:
        """Make the network run with updated weights (`show`), which follow N:M in stored order.

        The update chooses which weights are kept. `examples` are calibration examples. Progress is saved in `saved`,
        and what an interrupted update saved there is taken. After `limit` seconds the weights that are left stay as
        they are. Raises `PermpruneError` if no update can be computed.
        """


@dataclass(frozen=True)
class LayerUpdate(Update):
    """An update of one layer at a time, given the second moments of its inputs.

    Blocks are updated one after the other, as in SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): the inputs of
    a block's layers are computed with updated weights in the blocks before it and unmasked weights in the block itself.
    """

    @abstractmethod
    def apply(
        self,
        weight: Float[Tensor, "rows channels"],
        moments: Float[Tensor, "channels channels"],
        order: Int[Tensor, " channels"],
        pattern: Pattern,
    ) -> Float[Tensor, "rows channels"]:
        """Prune one layer and update the remaining weights.

        `weight` is fp32 (rows, channels); `moments` are the second moments H of its inputs, fp32 (channels, channels).
        `order`, int64 (channels,), lists the columns in stored order, in which groups of m neighbours follow the
        pattern. Returns fp32 (rows, channels) in the order of `weight`, which is not changed. Raises `PermpruneError`
        if H cannot be used.
        """

    def run(
        self, network: PrunedNetwork, examples: Examples, *, saved: Resumable | None = None, limit: float = math.inf
    ) -> None:
        """Run one forward pass over all examples in one batch, and update each block just before it runs."""
        columns, shown = network.stored_columns(), examples.to(network.device)
        padding, saved = padding_of(network.model, shown), saved or Resumable(Checkpoint(None, {}), self.name)
        before, _ = saved.take() or ({}, {})
        if before.keys() >= network.layers.keys():
            network.show(before)
            return
        names: list[str] = []

        def state() -> State:
            return Computed(names, network.updated.__getitem__), {}

        def visit(layers: list[Layer], run_block: Callable[[], Any]) -> None:
            if found := {layer.name: before[layer.name] for layer in layers if layer.name in before}:
                network.show(found)
                names.extend(found)
                return
            if distributed.mean(saved.seconds) > limit:
                log.warning("%s: no time is left: blocks from %s on are not updated", self.name, layers[0].name)
                raise Done
            network.show({layer.name: network.weights[layer.name].to(layer.stored.dtype) for layer in layers})
            inputs = InputMoments({network.sites[layer.name]: layer for layer in layers})
            with inputs.observe(padding):
                run_block()
            measured, known = inputs.result(), network.statistics.moments
            with torch.autocast(network.device.type, enabled=False):
                updated = {}
                for layer in layers:
                    site = network.sites[layer.name]
                    moments = (measured if site in measured else known)[site]  # few tokens may reach an expert
                    weight = self._layer(network, layer.name, moments, columns[layer.name])
                    updated[layer.name] = weight.to(layer.stored.dtype)  # as it will be stored
                network.show(updated)
            names.extend(updated)
            saved.offer(state)

        pruned = network.layers.values()
        with (
            block_by_block(network.model, pruned, visit, self.name),
            torch.no_grad(),
            frozen(network.model),
            network.autocast(),
        ):
            network.task(network.model, shown)
        saved.save(state)

    def _layer(self, network: PrunedNetwork, name: str, moments: Tensor, order: Tensor) -> Tensor:
        try:
            return self.apply(network.weights[name].float(), moments, order, network.patterns[name])
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error


def weights_and_masks(network: PrunedNetwork) -> tuple[Shelf, dict[str, Tensor]]:
    """Return what an update that the network shows comes to: weights to be masked, and masks (`MaskedLayers.bits`).

    Each group keeps its N largest weights, of which some may be 0; pruned weights keep the values that they had. The
    network does not show the update any more.
    """
    before, updated, kept = network.bits, network.updated, network.shelf.another()
    columns, masks = network.stored_columns(), dict[str, Tensor]()
    for name, weight in updated.items():
        mask = torch.zeros_like(weight, dtype=torch.bool)
        write_mask(mask, weight.abs(), columns[name], network.patterns[name])
        masks[name] = pack_mask(mask)
    network.set_bits(before | masks)
    for name in [*updated]:
        dtype = network.layers[name].stored.dtype
        kept[name] = torch.where(network.masks[name], updated.pop(name), network.weights[name]).to(dtype)
    kept.update((name, network.trained[name]) for name in network.trained if name not in kept)
    return kept, before | masks
