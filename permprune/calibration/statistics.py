"""What flows into each layer, and which of its outputs the loss feels: one pass over the calibration examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.moments import InputMoments
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.losses.targets import Features, Predictions, Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.forward import frozen, padding_of
from permprune.models.layers import Layer
from permprune.system import distributed
from permprune.system.device import autocast, compute_device
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
    *,
    dtype: torch.dtype,
    batch: int = 4,
    memory: int | None = None,
    recompute: bool = False,
    seed: int = 0,
) -> Statistics:
    """Stream `examples` through the model, forward and backward.

    `sites` names, for each layer, the tensor it reads; layers with one site share one H. Activations have type
    `dtype`. `batch` examples at a time are moved to the model's device; `recompute` runs each block again in the
    backward pass (`recomputed`): both leave the result as it is and bound the memory of the activations. `memory`
    bounds the bytes of the accumulators: sites that do not fit wait for a further pass. `seed` decides on what is drawn
    at random where there are no labels (`Predictions.fisher_loss`), the same for any number of processes. Raises
    `PermpruneError` when a loss or a statistic is not finite.
    """
    readers = {sites[layer.name]: layer for layer in reversed(layers)}
    first, *further = _split(readers, memory)
    if further:
        log.info("calibration needs %d passes to stay within the memory limit", 1 + len(further))
    parts = distributed.share(list(enumerate(batches(examples, batch))))
    reading = _Pass(model, task, parts, dtype, seed)
    one_label_per_example = reading.terms(examples[:1]) == 1
    sums = {layer.name: layer.weight.new_zeros(len(layer.weight), dtype=torch.float64) for layer in layers}
    with frozen(model):
        with _graph_from(layers), recomputed(model, recompute):
            moments, terms = reading.differentiated(first, layers, sums, one_label_per_example=one_label_per_example)
        for group in further:
            moments |= reading.forward(group)
    distributed.add_(list(sums.values()))
    (terms,) = distributed.total(terms)
    fisher = {name: (total / terms).float() for name, total in sums.items()}
    for name, diagonal in fisher.items():
        if not torch.isfinite(diagonal).all():
            raise PermpruneError(
                f"gradients at {name} overflow on the calibration data: check the checkpoint's weights"
            )
    return Statistics(moments, fisher, int(terms), one_label_per_example)


@dataclass(frozen=True)
class _Pass:
    """One way through the batches of this rank, each with its number."""

    model: nn.Module
    task: Task
    parts: Sequence[tuple[int, Examples]]
    dtype: torch.dtype
    seed: int

    @torch.no_grad()
    def terms(self, examples: Examples) -> int:
        """How many terms the loss of some examples has."""
        with frozen(self.model):
            return self._outputs(examples.to(compute_device(self.model))).terms

    @torch.no_grad()
    def forward(self, readers: dict[str, Layer]) -> dict[str, Tensor]:
        """The second moments of what the readers read, by site."""
        inputs = InputMoments(readers)
        for _, part in self._batches():
            with inputs.observe(padding_of(self.model, part)):
                self._outputs(part)
        return inputs.result()

    def differentiated(
        self, readers: dict[str, Layer], layers: list[Layer], fisher: dict[str, Tensor], *, one_label_per_example: bool
    ) -> tuple[dict[str, Tensor], float]:
        """As `forward`, with a backward pass that adds to `fisher` of the layers; also the number of terms."""
        inputs, terms = InputMoments(readers), 0.0
        for number, part in self._batches():
            padding = padding_of(self.model, part)
            with (
                inputs.observe(padding),
                output_fisher(layers, fisher, one_label_per_example=one_label_per_example, padding=padding),
            ):
                outputs = self._outputs(part)
                with autocast(part.device, self.dtype):
                    loss = outputs.fisher_loss(self._generator(number))
                if not torch.isfinite(loss):
                    raise PermpruneError(
                        "the loss on the calibration data is not finite: check the checkpoint and the data"
                    )
                loss.backward()
            terms += outputs.terms
        return inputs.result(), terms

    def _batches(self) -> Iterator[tuple[int, Examples]]:
        device = compute_device(self.model)
        for number, part in track(self.parts, "calibrating"):
            yield number, part.to(device)

    def _outputs(self, part: Examples) -> Predictions | Features:
        with autocast(part.device, self.dtype):
            return self.task(self.model, part)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2**20 + number) % 2**63)


@contextmanager
def _graph_from(layers: list[Layer]) -> Iterator[None]:
    """Start the graph at the first of the layers that runs."""

    def start(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        return None if x.requires_grad or not torch.is_grad_enabled() else (x.detach().requires_grad_(), *args[1:])

    handles = [layer.module.register_forward_pre_hook(start) for layer in layers]
    try:
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
