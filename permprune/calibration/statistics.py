"""What flows into each layer, and which of its outputs the loss feels: one pass over the calibration examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.moments import input_moments
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.losses.targets import Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.forward import frozen
from permprune.models.layers import Layer
from permprune.system import distributed
from permprune.system.progress import log, track


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics.

    `moments[site]` is H = X^T X / tokens, fp32 (channels, channels), of the tensor X (tokens, channels) read there, a
    token being any position, such as a patch of an image; `fisher[layer]` is the mean over the `terms` of the loss of
    the squared gradient of their sum by each output, fp32 (rows,). With `one_label_per_example` the gradients of an
    example's positions are summed before they are squared (`row_fisher`). Padding counts in neither.
    """

    moments: dict[str, Tensor]
    fisher: dict[str, Tensor]
    terms: int
    one_label_per_example: bool = False


def calibrate(
    model: nn.Module,
    layers: list[Layer],
    sites: dict[str, str],
    examples: Examples,
    task: Task,
    dtype: torch.dtype,
    batch: int = 4,
    memory: int | None = None,
    recompute: bool = False,
    seed: int = 0,
) -> Statistics:
    """Stream `examples` through the model, forward and backward.

    `sites` names, for each layer, the tensor it reads; layers with one site share one H. Activations have type
    `dtype`. `batch` examples at a time; `recompute` runs each block again in the backward pass (`recomputed`): both
    leave the result as it is and bound the memory of the activations. `memory` bounds the bytes of the accumulators:
    sites that do not fit wait for a further pass. `seed` decides on what is drawn at random where there are no labels
    (`Predictions.fisher_loss`), the same for any number of processes. Raises `PermpruneError` when a loss or a
    statistic is not finite.
    """
    readers = {sites[layer.name]: layer for layer in reversed(layers)}
    passes = _split(readers, memory)
    if len(passes) > 1:
        log.info("calibration needs %d passes to stay within the memory limit", len(passes))
    moments: dict[str, Tensor] = {}
    fisher = {layer.name: layer.weight.new_zeros(len(layer.weight), dtype=torch.float64) for layer in layers}
    with frozen(model), torch.no_grad(), torch.autocast(examples.device.type, dtype, dtype != torch.float32):
        one_label_per_example = task(model, examples[:1]).terms == 1
    terms = 0.0
    for number, group in enumerate(passes):
        first = number == 0
        with (
            _graph(layers if first else [], fisher, one_label_per_example),
            input_moments(group) as found,
            frozen(model),
            recomputed(model, recompute and first),
        ):
            for place, part in track(distributed.share(list(enumerate(batches(examples, batch)))), "calibrating"):
                with (
                    torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32),
                    torch.set_grad_enabled(first),
                ):
                    said = task(model, part)
                    total = said.fisher_loss(torch.Generator().manual_seed((seed * 2**20 + place) % 2**63))
                if not torch.isfinite(total):
                    raise PermpruneError(
                        "the loss on the calibration data is not finite: check the checkpoint and the data"
                    )
                if first:
                    total.backward()
                    terms += said.terms
        moments |= found
    distributed.add_(list(fisher.values()))
    (terms,) = distributed.total(terms)
    for name, diagonal in fisher.items():
        if not torch.isfinite(diagonal).all():
            raise PermpruneError(
                f"gradients at {name} overflow on the calibration data: check the checkpoint's weights"
            )
    return Statistics(
        moments, {name: (f / terms).float() for name, f in fisher.items()}, int(terms), one_label_per_example
    )


@contextmanager
def _graph(layers: list[Layer], fisher: dict[str, Tensor], one_label_per_example: bool) -> Iterator[None]:
    """Hooks that start the graph at the first layer and add up the Fisher diagonals at each layer."""

    def start(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        return None if x.requires_grad or not torch.is_grad_enabled() else (x.detach().requires_grad_(), *args[1:])

    handles = [layer.module.register_forward_pre_hook(start) for layer in layers]
    try:
        with output_fisher(layers, fisher, one_label_per_example):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _split(readers: dict[str, Layer], memory: int | None) -> list[dict[str, Layer]]:
    """The sites in as few passes as the fp64 accumulators fit into `memory` bytes; at least one site a pass."""
    passes: list[dict[str, Layer]] = [{}]
    used = 0
    for site, layer in readers.items():
        size = 8 * layer.weight.shape[1] ** 2
        if memory and passes[-1] and used + size > memory:
            passes.append({})
            used = 0
        passes[-1][site] = layer
        used += size
    return passes
