"""What flows into each layer, and which of its outputs the loss feels: one pass over the calibration examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from permprune import parallel
from permprune.errors import PermpruneError
from permprune.examples import Examples, batches
from permprune.layers import Layer
from permprune.padding import mask_of, real
from permprune.progress import log, track
from permprune.recompute import recomputed, recomputing
from permprune.tasks import Task

BLOCK = 2**24
"""Elements of weight gradients that are formed at a time."""


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics.

    `moments[site]` is H = X^T X / tokens, fp32 (channels, channels), of the tensor X (tokens, channels) read there, a
    token being any position, such as a patch of an image; `fisher[layer]` is the mean over the `terms` of the loss of
    the squared gradient of their sum by each output, fp32 (rows,), where each example has one answer (`together`) of
    its positions taken together (`row_fisher`). Padding counts in neither.
    """

    moments: dict[str, Tensor]
    fisher: dict[str, Tensor]
    terms: int
    together: bool = False


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
        together = task(model, examples[:1]).terms == 1
    terms = 0.0
    for number, group in enumerate(passes):
        first = number == 0
        with (
            _graph(layers if first else [], fisher, together),
            input_moments(group) as found,
            frozen(model),
            recomputed(model, recompute and first),
        ):
            for place, part in track(parallel.share(list(enumerate(batches(examples, batch)))), "calibrating"):
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
    parallel.add_(list(fisher.values()))
    (terms,) = parallel.total(terms)
    for name, diagonal in fisher.items():
        if not torch.isfinite(diagonal).all():
            raise PermpruneError(
                f"gradients at {name} overflow on the calibration data: check the checkpoint's weights"
            )
    return Statistics(moments, {name: (f / terms).float() for name, f in fisher.items()}, int(terms), together)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside, and dropout is off; both are as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


@contextmanager
def output_fisher(layers: list[Layer], fisher: dict[str, Tensor], together: bool) -> Iterator[None]:
    """Add the rows' Fisher information of every backward pass inside, padding apart, to `fisher[layer]` (rows,).

    With `together` it is `row_fisher`, or where `fisher[layer]` is (rows, rows) `row_covariance`, else the squared
    output gradients.
    """

    def add(name: str, mask: Tensor | None, kept: Callable[[], Tensor] | None, gradient: Tensor) -> None:
        if kept is None:
            rows = gradient if mask is None else gradient[mask]
            found = rows.flatten(0, -2).float().square().sum(0)
        else:
            found = (row_fisher if fisher[name].dim() == 1 else row_covariance)(kept(), gradient, mask)
        fisher[name] += found.to(fisher[name])

    def forward(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            apart = output.dim() < 3 or not together
            kept = None if apart else _keep(args[0].detach().to(output.dtype))
            output.register_hook(partial(add, name, mask_of(output), kept))

    handles = [layer.module.register_forward_hook(partial(forward, layer.name)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_fisher(inputs: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """The Fisher information of each row of a weight over the mean square of its inputs, summed over examples, (rows,).

    `inputs` (examples, ..., channels) are what a layer read, `gradient` (examples, ..., rows) is that of the loss by
    what it said. With G the gradient of an example's loss by the weight, the example adds |G_r|^2 / mean |x|^2: in the
    model F_r = fisher_r * H a row's information has the trace of the true one. Squared output gradients, summed over
    positions, say the same of positions that push apart. Those of an image all feel its one answer and push together,
    by which that sum is up to as many times too small as there are positions (Eschenhagen et al. 2023, arXiv
    2311.00636, call the two "reduce" and "expand"). Where each position has an answer of its own, |G_r|^2 counts the
    mean gradient as often as there are answers, which is no part of the information: there the sum is nearer.
    """
    x, g, squares = _examples(inputs, gradient, mask)
    with torch.autocast(x.device.type, enabled=False):
        return (_gradient_norms(x, g) / squares[:, None]).sum(0)


def row_covariance(inputs: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """That of each pair of rows, (rows, rows): `row_fisher` is its diagonal.

    An example adds G G^T / mean |x|^2. With few classes every example pushes the rows in about the same direction:
    rows that all follow the gradient meet a curvature up to as many times that of the diagonal as there are rows.
    """
    x, g, squares = _examples(inputs, gradient, mask)
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float()  # gradients of keys add up to 0, so that what the inputs have in common must cancel
        pushed = (wide @ wide.mT @ g.float()) / squares[:, None, None]
        return (g.flatten(0, 1).T @ pushed.flatten(0, 1).to(g.dtype)).float()


def _examples(inputs: Tensor, gradient: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and gradients, (examples, positions, ...), those of padding 0, and the examples' mean |x|^2."""
    dtype = torch.bfloat16 if gradient.dtype == torch.bfloat16 else torch.float32
    x, g = (part.flatten(1, -2).to(dtype) for part in (inputs, gradient))
    shown = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.flatten(1)
    squares = (x.float().square().sum(-1) * shown).sum(1) / shown.sum(1).clamp_min(1)
    return x, g * shown[..., None].to(dtype), squares.clamp_min(1e-30)


def _gradient_norms(x: Tensor, g: Tensor) -> Tensor:
    """|G_r|^2 of each example and row, fp32 (examples, rows), of G = g^T x for an example.

    `x` is (examples, positions, channels), `g` (examples, positions, rows). With few positions it is the quadratic form
    g_r^T (x x^T) g_r, else the sum of the squares of G, which is formed for some examples at a time.
    """
    (_, positions, channels), rows = x.shape, g.shape[-1]
    if 2 * positions * (channels + rows) < channels * rows:
        x, g = x.float(), g.float()
        return (g * (x @ x.mT @ g)).sum(1).clamp_min(0)
    count = max(1, BLOCK // (channels * rows))
    pairs = zip(x.split(count), g.split(count), strict=True)
    return torch.cat([torch.bmm(slope.mT, own).float().square().sum(2) for own, slope in pairs])


def _keep(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep a tensor as the graph keeps activations: a block that runs again (`recomputed`) does not hold it."""
    node = _Kept.apply(torch.zeros((), requires_grad=True), tensor).grad_fn
    return lambda: node.saved_tensors[0]  # type: ignore[no-any-return]


class _Kept(torch.autograd.Function):
    """A node that saves a tensor; nothing flows back through it."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return scalar.clone()


@contextmanager
def input_moments(readers: dict[str, Layer]) -> Iterator[dict[str, Tensor]]:
    """The second moments of what layers read inside.

    `readers` names one layer for each site. The dict yielded is empty until the context is left; then it holds, by
    site, H = X^T X / tokens, fp32 (channels, channels). Each call's product is formed in fp32, whatever the type of the
    activations, and added in fp64: rounded to bf16 H has negative eigenvalues, which a search would find. Padding does
    not count, and blocks that run again for their gradients count once. Raises `PermpruneError` when a product
    overflows.
    """
    sums = {
        site: layer.weight.new_zeros(2 * layer.weight.shape[1:], dtype=torch.float64) for site, layer in readers.items()
    }
    seen = dict.fromkeys(readers, 0)
    moments: dict[str, Tensor] = {}

    def add(site: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if recomputing():
            return
        x = real(args[0])
        sums[site] += inner_product(x).to(sums[site])
        seen[site] += x.shape[:-1].numel()

    handles = [layer.module.register_forward_pre_hook(partial(add, site)) for site, layer in readers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    parallel.add_(list(sums.values()))
    counts = parallel.total(*seen.values())
    for site, count in zip(readers, counts, strict=True):
        moments[site] = (sums.pop(site) / count).float()
        if not torch.isfinite(moments[site]).all():
            raise PermpruneError(
                f"activations at {site} overflow on the calibration data: calibrate with --precision fp32"
            )


def inner_product(x: Tensor) -> Tensor:
    """X^T X of activations (..., channels), fp32 (channels, channels) whatever their type."""
    rows = x.detach().flatten(0, -2).float()
    with torch.autocast(x.device.type, enabled=False):
        return rows.T @ rows


@contextmanager
def _graph(layers: list[Layer], fisher: dict[str, Tensor], together: bool) -> Iterator[None]:
    """Hooks that start the graph at the first layer and add up the Fisher diagonals at each layer."""

    def start(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        return None if x.requires_grad or not torch.is_grad_enabled() else (x.detach().requires_grad_(), *args[1:])

    handles = [layer.module.register_forward_pre_hook(start) for layer in layers]
    try:
        with output_fisher(layers, fisher, together):
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
