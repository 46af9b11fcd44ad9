"""Calibration: second moments of layer inputs and Fisher information of layer outputs, from one pass over examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permprune.calibration.fisher import output_fisher
from permprune.calibration.moments import InputMoments, accumulator_bytes, warn_of_rare
from permprune.calibration.symmetric import Symmetrics, SymmetricShelf
from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples, batches
from permprune.losses.targets import Outputs, Task
from permprune.models.activation_checkpointing import recomputed
from permprune.models.autocast import autocast
from permprune.models.experts import Routed
from permprune.models.forward import frozen, padding_of, short_inputs
from permprune.models.hooks import continues, hooked, layers_up_to_each, resumed
from permprune.models.layers import Layer
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import log, track
from permprune.system.shelf import Shelf

UNREAD = 1e-6
"""The Fisher information of an expert's rows, as a share of the mean, if no token is routed to the expert. It weights
the rows of the expert alike, and hardly counts beside other layers that follow the same order."""


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics.

    `moments[site]` is H = X^T X / tokens, fp32 (channels, channels), where X (tokens, channels) is the tensor that
    layers read at the site; a token is any position, such as an image patch. `fisher[layer]`, fp32 (rows,), is the
    squared gradient of the summed loss with respect to each output, summed over positions and divided by `terms`, the
    number of terms of the loss. With `one_label_per_example` the gradients of an example's positions are summed before
    they are squared (`row_fisher`). Padding is left out of both.
    """

    moments: Symmetrics
    fisher: dict[str, Tensor]
    terms: int
    one_label_per_example: bool = False


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    sites: Mapping[str, str],
    examples: Examples,
    task: Task,
    *,
    dtype: torch.dtype,
    batch: int = 4,
    memory: int | None = None,
    recompute: bool = False,
    half: bool = False,
    seed: int = 0,
    fisher: bool = True,
    shelf: Shelf | None = None,
) -> Statistics:
    """Run `examples` through the model, forward and backward, and collect the statistics of its layers.

    Without `fisher` they run forward only, and the Fisher information is left out.

    `sites` maps each layer to the name of the tensor it reads; layers that read the same tensor share one H. Experts
    read only the tokens routed to them; those that read fewer than `FEWEST` are measured on all tokens of their layer.
    Activations have type `dtype`. `batch` examples at a time are moved to the model's device, and `recompute` turns on
    activation checkpointing (`recomputed`); both bound the memory of activations and do not change the result. `memory`
    is a limit in bytes for the accumulators: the sites that do not fit are measured in further forward passes. With
    `half` the second moments are stored as correlations in fp16 (`Symmetric`); they are read as fp32. `seed` is that of
    the labels that are drawn at random if there are none (`Outputs.fisher_loss`); they are the same for any number of
    processes. If tensors of `shelf` do not rest on the device, all examples run through one block before the next, so
    that the sums of one block are held and none rest (`_Pass.forward_by_block`); sums of a model that cannot go on from
    one block to the next rest there as well. Raises `PermpruneError` if a loss or a statistic is not finite.
    """
    readers = {sites[layer.name]: layer for layer in reversed(layers)}
    shelf = Shelf() if shelf is None else shelf
    if memory is not None:  # each process holds a part of each sum, unless they rest elsewhere
        memory = memory * distributed.shards() if shelf.place == "device" else None
    first, *further = _split(readers, memory)
    if further:
        log.info("calibration needs %d passes to stay within the memory limit", 1 + len(further))
    parts = distributed.share(list(enumerate(batches(examples, batch))))
    reading = _Pass(model, task, parts, dtype, half, seed, shelf)
    one = _most_labelled(examples).to(compute_device(model))
    with torch.no_grad(), frozen(model), hooked(layers, after=lambda *_: None):  # which refuses more than a tensor
        one_label_per_example = reading.outputs(one).terms == 1
    differentiated = layers if fisher else []
    sums = {layer.name: layer.stored.new_zeros(layer.shape[0], dtype=torch.float64) for layer in differentiated}
    with frozen(model):
        by_block = shelf.place != "device" and reading.continues(examples)
        forward = reading.forward_by_block if by_block else reading.forward
        moments, terms = {} if fisher and not by_block else forward(first).stored, 0.0
        if fisher:
            with _graph_from(layers), recomputed(model, recompute):
                measured, terms = reading.differentiated(
                    {} if by_block else first, layers, sums, one_label_per_example=one_label_per_example
                )
            moments = moments or measured.stored
        for group in further:
            moments.update(forward(group).stored)
        rare = {site: layer for site, layer in readers.items() if site not in moments}
        warn_of_rare({(layer.owner, layer.expert) for layer in rare.values()}, layers)
        for group in _split(rare, memory) if rare else []:
            moments.update(forward(group, whole=True).stored)
    distributed.add_(list(sums.values()))
    (terms,) = distributed.total(terms)
    information = _information(sums, terms, layers) if fisher else {}
    return Statistics(Symmetrics(moments), information, int(terms), one_label_per_example)


def _most_labelled(examples: Examples) -> Examples:
    """The example with the most labels, or the first one: one answer may be a single token where others are not."""
    labels = examples.get("labels")
    most = 0 if labels is None or labels.dim() < 2 else int(labels.ne(IGNORED).sum(1).argmax())
    return examples[most : most + 1]


def _information(sums: dict[str, Tensor], terms: float, layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Return the Fisher information of sums over so many terms of the loss; that of experts not read is small.

    Raises `PermpruneError` if it is not finite.
    """
    information = {name: (total / terms).float() for name, total in sums.items()}
    for name, diagonal in information.items():
        if not torch.isfinite(diagonal).all():
            raise PermpruneError(
                f"gradients at {name} overflow on the calibration data: check the checkpoint's weights"
            )
    unread = [layer for layer in layers if layer.expert is not None and not information[layer.name].any()]
    mean = sum(float(diagonal.mean()) for diagonal in information.values()) / len(information)
    for layer in unread:
        information[layer.name].fill_(UNREAD * mean)
    return information


@dataclass(frozen=True)
class _Pass:
    """A pass over the batches of this rank; `parts` are (number among the batches of all ranks, batch)."""

    model: nn.Module
    task: Task
    parts: Sequence[tuple[int, Examples]]
    dtype: torch.dtype
    half: bool
    seed: int
    shelf: Shelf

    def continues(self, examples: Examples) -> bool:
        """Whether the model can be calibrated block by block: passes go on from one block to the next."""
        with autocast(compute_device(self.model), self.dtype, blocks=False):
            return continues(self.model, short_inputs(self.model, examples))

    @torch.no_grad()
    def forward(self, readers: dict[str, Layer], whole: bool = False) -> Symmetrics:
        """Return the second moments of the readers' inputs, by site; `whole` is that of `InputMoments`."""
        inputs = InputMoments(readers, half=self.half, whole=whole, shelf=self.shelf)
        for _, examples in self._batches():
            with inputs.observe(padding_of(self.model, examples)):
                self.outputs(examples)
        return inputs.result()

    @torch.no_grad()
    def forward_by_block(self, readers: dict[str, Layer], whole: bool = False) -> Symmetrics:
        """The same, with all batches in one block before the next: only the sums of one block are held, and none rest.

        The weights of each block are read for all batches in turn, too.
        """
        aside = self.shelf.another()
        aside.put_aside()
        moments, outputs = SymmetricShelf(aside), [dict[nn.Module, Any]() for _ in self.parts]
        sites = {layer.name: site for site, layer in readers.items()}
        for reached, layers in track(layers_up_to_each(self.model, readers.values()), "calibrating"):
            inputs = InputMoments({sites[layer.name]: layer for layer in layers}, half=self.half, whole=whole)
            for (_, part), known in zip(self.parts, outputs, strict=True):
                examples = part.to(compute_device(self.model))
                with inputs.observe(padding_of(self.model, examples)), resumed(reached, known):
                    self.outputs(examples)
            moments.update(inputs.result().stored)
        return Symmetrics(moments)

    def differentiated(
        self,
        readers: dict[str, Layer],
        layers: Iterable[Layer],
        fisher: dict[str, Tensor],
        *,
        one_label_per_example: bool,
    ) -> tuple[Symmetrics, float]:
        """Like `forward`, with a backward pass that accumulates `fisher`. Returns (moments, number of terms)."""
        inputs, terms = InputMoments(readers, half=self.half, shelf=self.shelf), 0.0
        for number, examples in self._batches():
            padding = padding_of(self.model, examples)
            with (
                inputs.observe(padding),
                output_fisher(layers, fisher, one_label_per_example=one_label_per_example, padding=padding),
            ):
                outputs = self.outputs(examples)
                with autocast(examples.device, self.dtype, blocks=False):
                    loss = outputs.fisher_loss(torch.Generator().manual_seed((self.seed * 2**20 + number) % 2**63))
                if not torch.isfinite(loss):
                    raise PermpruneError(
                        "the loss on the calibration data is not finite: check the checkpoint and the data"
                    )
                loss.backward()
            terms += outputs.terms
        return inputs.result(), terms

    def _batches(self) -> Iterator[tuple[int, Examples]]:
        device = compute_device(self.model)
        for number, examples in track(self.parts, "calibrating"):
            yield number, examples.to(device)

    def outputs(self, examples: Examples) -> Outputs:
        """Run the model on some examples, not in blocks, where the squared gradients of keys are less exact."""
        with autocast(examples.device, self.dtype, blocks=False):
            return self.task(self.model, examples)


@contextmanager
def _graph_from(layers: Iterable[Layer]) -> Iterator[None]:
    """Start the autograd graph at the first of the layers that runs, as no parameter requires a gradient."""

    def start(_layer: Layer, x: Tensor, _routed: Routed | None) -> Tensor | None:
        return None if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()

    with hooked(layers, before=start):
        yield


def _split(readers: dict[str, Layer], memory: int | None) -> list[dict[str, Layer]]:
    """Split the sites into passes (`sums_by_pass`)."""
    widths = {site: layer.shape[1] for site, layer in readers.items()}
    return [{site: readers[site] for site in one} for one in sums_by_pass(widths, memory)]


def sums_by_pass(widths: Mapping[str, int], memory: int | None) -> list[dict[str, int]]:
    """Split sites into passes whose accumulators fit into `memory` bytes; each pass has at least one site.

    `widths` are the numbers of channels by site. Each pass has the same form.
    """
    passes: list[dict[str, int]] = [{}]
    for site, width in widths.items():
        if memory and passes[-1] and accumulator_bytes([*passes[-1].values(), width]) > memory:
            passes.append({})
        passes[-1][site] = width
    return passes
