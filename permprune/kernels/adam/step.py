"""A step of Adam for the weights that a mask keeps, whose first moments are stored for these weights only.

It runs in native code for contiguous fp32 or bf16 tensors on the CPU, and in PyTorch otherwise, with the same results
up to the rounding of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.adam.rounding import rounded
from permprune.kernels.search.masks import require_layout, unpack_mask

BETAS = (0.9, 0.95)
"""Adam's betas; the second is that of language models, which suits a small number of steps."""

EPSILON = 1e-8
"""Adam's epsilon, which is added to the root of the second moment."""

RISING = 0.1
"""The share of the steps in which the learning rate rises from 0; it falls to 0 in the others."""

SQUARED = 256
"""Channels of a block, as in adam.h."""


def rate_at(place: float) -> float:
    """The learning rate at a place of a schedule, from 0 to 1, relative to the highest."""
    return min(place / RISING, (1 - place) / (1 - RISING))


def squared_sums(gradient: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the squares of what a mask keeps of each row and of each channel, fp32 (rows,), (channels,).

    `gradient` is (rows, channels), of fp32 or bf16, and `bits` a mask as from `pack_mask`.
    """
    rows, width = gradient.shape
    if gradient.dtype not in (torch.float32, torch.bfloat16) or not _is_native(gradient, bits):
        kept = torch.where(unpack_mask(bits, width), gradient, 0).float().square_()
        return kept.sum(1), kept.sum(0)
    require_layout("a mask", bits, torch.uint8, rows, -(-width // 8))
    by_row = gradient.new_empty(-(-width // SQUARED), rows, dtype=torch.float32)
    by_channel = gradient.new_empty(width, dtype=torch.float32)
    library.run(
        "square",
        gradient.numel(),
        gradient=gradient,
        bits=bits,
        by_row=by_row,
        by_channel=by_channel,
        rows=rows,
        width=width,
        number=library.NUMBERS[gradient.dtype],
    )
    return by_row.sum(0), by_channel


def _is_native(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors) and library.available()


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    bits: Tensor,
    mean: Tensor,
    roots: tuple[Tensor, Tensor],
    *,
    step: int,
    rate: float,
    beta: float,
    seed: int = 0,
) -> None:
    """Update the kept weights and their first moments in place (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1).

    `weight` and `gradient` are (rows, channels), both fp32 or both bf16. `bits` is a mask as from `pack_mask` that
    keeps the same number of weights in each row, and the first moments `mean`, of decay `beta`, are (rows, kept) of the
    weights' type. The outer product of the `roots`, fp32 (rows,) and (channels,), are the roots of the second moments,
    without their bias. `step` is the number of the step, from 1. Arithmetic is in fp32. Weights in bf16 are rounded
    stochastically, so that on average a step smaller than their spacing is not lost; `seed`, from 0 to 2**32 - 1, has
    to differ from step to step. Raises `PermpruneError` if the tensors do not match.
    """
    (rows, width), kept, (by_row, by_channel) = weight.shape, mean.shape[1], roots
    fits = gradient.shape == weight.shape and len(mean) == rows and bits.shape == (rows, -(-width // 8))
    fits &= (by_row.shape, by_channel.shape) == ((rows,), (width,))
    fits &= by_row.dtype == by_channel.dtype == torch.float32 and weight.dtype == gradient.dtype == mean.dtype
    if not (fits and weight.dtype in (torch.float32, torch.bfloat16)):
        raise PermpruneError(
            "a step of Adam needs a weight, a gradient, a mask and moments that match, in fp32 or bf16"
        )
    rate /= 1 - beta**step
    if not _is_native(weight, gradient, bits, mean, by_row, by_channel):
        mask = unpack_mask(bits, width)
        new_mean = mean.float().mul_(beta).add_(gradient[mask].float().view_as(mean), alpha=1 - beta)
        mean.copy_(new_mean)
        roots_of_kept = by_channel.expand_as(weight)[mask].view_as(mean).mul_(by_row[:, None]).add_(EPSILON)
        change = torch.div(new_mean, roots_of_kept, out=roots_of_kept).flatten()
        value = weight[mask].float().sub_(change, alpha=rate)
        weight[mask] = value if weight.dtype == torch.float32 else rounded(value, seed)
        return
    library.run(
        "step",
        weight.numel(),
        weight=weight,
        gradient=gradient,
        bits=bits,
        mean=mean,
        by_row=by_row,
        by_channel=by_channel,
        rows=rows,
        width=width,
        kept=kept,
        rate=rate,
        first=beta,
        least=EPSILON,
        seed=seed,
        number=library.NUMBERS[weight.dtype],
    )
