"""The Fisher information of layer outputs, added up during backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from permprune.models.layers import Layer
from permprune.models.padding import Padding

BLOCK = 2**24
"""Elements of weight gradients that are formed at a time."""


@contextmanager
def output_fisher(
    layers: list[Layer], fisher: dict[str, Tensor], *, one_label_per_example: bool, padding: Padding
) -> Iterator[None]:
    """Add the rows' Fisher information of every backward pass inside to `fisher[layer]` (rows,).

    `padding` is that of the batches inside, and does not count. With `one_label_per_example` it is `row_fisher`, or
    `row_covariance` where `fisher[layer]` is (rows, rows); otherwise the squared output gradients.
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
            apart = output.dim() < 3 or not one_label_per_example
            kept = None if apart else _keep(args[0].detach().to(output.dtype))
            output.register_hook(partial(add, name, padding.mask_of(output), kept))

    handles = [layer.module.register_forward_hook(partial(forward, layer.name)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_fisher(
    inputs: Float[Tensor, "examples *positions channels"],
    gradient: Float[Tensor, "examples *positions rows"],
    mask: Bool[Tensor, " examples *positions"] | None = None,
) -> Float[Tensor, " rows"]:
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


def row_covariance(
    inputs: Float[Tensor, "examples *positions channels"],
    gradient: Float[Tensor, "examples *positions rows"],
    mask: Bool[Tensor, " examples *positions"] | None = None,
) -> Float[Tensor, "rows rows"]:
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
