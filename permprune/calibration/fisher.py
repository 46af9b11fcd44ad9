"""Fisher information of layer outputs, accumulated during backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from permprune.models.experts import Routed
from permprune.models.forward import Padding
from permprune.models.hooks import hooked
from permprune.models.layers import Layer

BLOCK = 2**24
"""Maximum number of elements of per-example weight gradients that are computed at a time."""


@contextmanager
def output_fisher(
    layers: Iterable[Layer], fisher: dict[str, Tensor], *, one_label_per_example: bool, padding: Padding
) -> Iterator[None]:
    """Add the Fisher information of the layers' rows to `fisher`, by layer, in every backward pass inside the context.

    With `one_label_per_example` and inputs of several positions this is `row_fisher` if `fisher[layer]` is (rows,), and
    `row_covariance` if it is (rows, rows). Otherwise, and for layers that read positions without their examples, such
    as experts, it is the squared output gradients, summed over positions. `padding` describes the batches that run
    inside the context; padded positions are left out. Of layers whose rows processes divide, only those of this process
    count (`Layer.rows`).
    """

    def add(layer: Layer, mask: Tensor | None, kept: Callable[[], Tensor] | None, gradient: Tensor) -> None:
        total, gradient = fisher[layer.name], gradient[..., layer.rows]
        if kept is None:
            rows = gradient if mask is None else gradient[mask]
            information = rows.flatten(0, -2).float().square().sum(0)
            total = total if total.dim() == 1 else total.diagonal()
        else:
            information = (row_fisher if total.dim() == 1 else row_covariance)(kept(), gradient, mask)
        total += information.to(total)

    def forward(layer: Layer, inputs: Tensor, routed: Routed | None, output: Tensor) -> None:
        if output.requires_grad:
            apart = output.dim() < 3 or not one_label_per_example
            kept = None if apart else _keep(inputs.detach().to(output.dtype))
            output.register_hook(partial(add, layer, padding.mask_of(output, routed, layer.owner), kept))

    with hooked(layers, after=forward):
        yield


def row_fisher(
    inputs: Float[Tensor, "examples *positions channels"],
    gradient: Float[Tensor, "examples *positions rows"],
    mask: Bool[Tensor, " examples *positions"] | None = None,
) -> Float[Tensor, " rows"]:
    """Return the Fisher information of each row of a weight, over the mean square of its inputs: (rows,).

    `inputs` (examples, ..., channels) are a layer's inputs, `gradient` (examples, ..., rows) is the gradient of the
    loss with respect to its outputs, and `mask` (examples, ...) is False at padding. Let G be the gradient of one
    example's loss with respect to the weight. The result is the sum of |G_r|^2 / mean |x|^2 over examples, so that in
    the approximation F_r = fisher_r * H each row's information has the correct trace.

    The squared output gradients, summed over positions, estimate the same quantity if the gradients of different
    positions are uncorrelated. The positions of an image share one label, so their gradients are aligned, and that sum
    is too small by a factor of up to the number of positions (Eschenhagen et al. 2023, arXiv 2311.00636, call the two
    estimates "reduce" and "expand"). If each position has its own label, |G_r|^2 overcounts the squared mean gradient
    by a factor of the number of labels, and the sum is the better estimate.
    """
    x, g, squares = _examples(inputs, gradient, mask)
    with torch.autocast(x.device.type, enabled=False):
        return (_gradient_norms(x, g) / squares[:, None]).sum(0)


def row_covariance(
    inputs: Float[Tensor, "examples *positions channels"],
    gradient: Float[Tensor, "examples *positions rows"],
    mask: Bool[Tensor, " examples *positions"] | None = None,
) -> Float[Tensor, "rows rows"]:
    """Return the Fisher information of each pair of rows, (rows, rows); its diagonal is `row_fisher`.

    The result is the sum of G G^T / mean |x|^2 over examples. With few classes the gradients of all examples are nearly
    parallel. If all rows change along the gradient together, the curvature is then up to `rows` times that of the
    diagonal alone.
    """
    x, g, squares = _examples(inputs, gradient, mask)
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float()  # the gradients of attention keys sum to 0, so the inputs' common part has to cancel
        pushed = (wide @ wide.mT @ g.float()) / squares[:, None, None]
        return (g.flatten(0, 1).T @ pushed.flatten(0, 1).to(g.dtype)).float()


def _examples(inputs: Tensor, gradient: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten inputs and gradients to (examples, positions, ...), with gradients of 0 at padding.

    Returns them and the mean |x|^2 of each example, (examples,).
    """
    dtype = torch.bfloat16 if gradient.dtype == torch.bfloat16 else torch.float32
    x, g = (tensor.flatten(1, -2).to(dtype) for tensor in (inputs, gradient))
    shown = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.flatten(1)
    squares = (x.float().square().sum(-1) * shown).sum(1) / shown.sum(1).clamp_min(1)
    return x, g * shown[..., None].to(dtype), squares.clamp_min(1e-30)


def _gradient_norms(x: Tensor, g: Tensor) -> Tensor:
    """Return |G_r|^2 of each example and row, fp32 (examples, rows), where G = g^T x for each example.

    `x` is (examples, positions, channels), `g` is (examples, positions, rows). With few positions the result is
    computed as the quadratic form g_r^T (x x^T) g_r, otherwise from G itself, for a few examples at a time.
    """
    (_, positions, channels), rows = x.shape, g.shape[-1]
    if 2 * positions * (channels + rows) < channels * rows:
        x, g = x.float(), g.float()
        return (g * (x @ x.mT @ g)).sum(1).clamp_min(0)
    count = max(1, BLOCK // (channels * rows))
    pairs = zip(x.split(count), g.split(count), strict=True)
    return torch.cat([torch.bmm(gradient.mT, inputs).float().square().sum(2) for inputs, gradient in pairs])


def _keep(tensor: Tensor) -> Callable[[], Tensor]:
    """Save a tensor as autograd saves activations, and return a function that returns it.

    Under activation checkpointing (`recomputed`) the tensor is not held in memory until its block is recomputed.
    """
    output = _Kept.apply(torch.zeros((), requires_grad=True), tensor)  # without it torch may free what its node saved
    return lambda: output.grad_fn.saved_tensors[0]  # type: ignore[no-any-return]


class _Kept(torch.autograd.Function):
    """An autograd node that saves a tensor; no gradient flows through it."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return scalar.clone()
