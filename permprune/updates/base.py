"""The interface of weight updates, no update, and the block-by-block pass that layer-wise updates share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from permprune.errors import PermpruneError
from permprune.options import require_fields
from permprune.pattern import Pattern
from permprune.system.imports import on_first_use
from permprune.system.progress import track

with on_first_use(globals()):
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn

    from permprune.calibration.moments import InputMoments
    from permprune.examples import Examples
    from permprune.models.forward import frozen, padding_of
    from permprune.models.hooks import attached
    from permprune.models.layers import Layer, blocks
    from permprune.pruning.network import PrunedNetwork


@dataclass(frozen=True)
class Update(ABC):
    """Changes the remaining weights, given a network's channel orders, to compensate for the pruned ones."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        require_fields(self)

    @abstractmethod
    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        """Make the network use updated weights (`show`), which follow N:M in stored order.

        `examples` are calibration examples. `masks` are the weights to keep, bool (rows, channels) by layer, in the
        network's own order; if they are None, the update chooses. Raises `PermpruneError` if no update can be computed.
        """


@dataclass(frozen=True)
class NoUpdate(Update):
    """Apply the masks only: every remaining weight keeps its value."""

    name: ClassVar[str] = "none"

    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        """Leave the network as it is."""


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
        mask: Bool[Tensor, "rows channels"] | None = None,
    ) -> Float[Tensor, "rows channels"]:
        """Prune one layer and update the remaining weights.

        `weight` is fp32 (rows, channels); `moments` are the second moments H of its inputs, fp32 (channels, channels).
        `order`, int64 (channels,), lists the columns in stored order, in which groups of m neighbours follow the
        pattern. `mask`, if given, is bool (rows, channels): the weights to keep. Returns fp32 (rows, channels) in the
        order of `weight`, which is not changed. Raises `PermpruneError` if H cannot be used.
        """

    def run(self, network: PrunedNetwork, examples: Examples, masks: Mapping[str, Tensor] | None = None) -> None:
        """Run one forward pass over all examples in one batch, and update each block just before it runs."""
        waiting = _layers_by_block(network)
        columns, shown = network.stored_columns(), examples.to(network.device)
        padding = padding_of(network.model, shown)

        def reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layers = waiting.pop(block, None)
            if layers is None:  # a block that runs again
                return
            next(bar)
            network.show({layer.name: network.weights[layer.name] for layer in layers})
            inputs = InputMoments({network.sites[layer.name]: layer for layer in layers})
            with inputs.observe(padding):
                block.forward(*args, **kwargs)  # calling `block` would run this hook again
            measured, known = inputs.result(), network.statistics.moments
            with torch.autocast(network.device.type, enabled=False):
                updated = {}
                for layer in layers:
                    mask, site = None if masks is None else masks[layer.name], network.sites[layer.name]
                    moments = (measured if site in measured else known)[site]  # few tokens may reach an expert
                    updated[layer.name] = self._layer(network, layer.name, moments, columns[layer.name], mask)
                network.show(updated)
            if not waiting:
                raise _AllUpdated

        bar = track(waiting.copy(), self.name)
        hooks = [block.register_forward_pre_hook(reach, with_kwargs=True) for block in waiting]
        with (
            attached(hooks),
            torch.no_grad(),
            closing(bar),
            suppress(_AllUpdated),
            frozen(network.model),
            network.autocast(),
        ):
            network.task(network.model, shown)

    def _layer(self, network: PrunedNetwork, name: str, moments: Tensor, order: Tensor, mask: Tensor | None) -> Tensor:
        try:
            return self.apply(network.weights[name].float(), moments, order, network.patterns[name], mask)
        except PermpruneError as error:
            raise PermpruneError(f"{name}: {error}") from error


class _AllUpdated(Exception):
    """Ends the forward pass after the last block was updated."""


def _layers_by_block(network: PrunedNetwork) -> dict[nn.Module, list[Layer]]:
    """Return the pruned layers of each repeated block; the layers of a module shared by blocks belong to the first."""
    block_of = {module: block for block in reversed(blocks(network.model)) for module in block.modules()}
    layers: dict[nn.Module, list[Layer]] = {}
    for layer in network.layers.values():
        layers.setdefault(block_of[layer.owner], []).append(layer)
    return layers
