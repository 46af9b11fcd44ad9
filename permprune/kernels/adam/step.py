"""A step of Adam for the weights that a mask keeps, whose moments are stored for these weights only.

It runs in native code for contiguous fp32 or bf16 tensors on the CPU, and in PyTorch otherwise, with the same results
up to the rounding of fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.kernels import library
from permprune.kernels.adam.rounding import rounded
from permprune.kernels.search.masks import unpack_mask

EPSILON = 1e-8
"""Adam's epsilon, which is added to the root of the second moment."""


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    bits: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    seed: int = 0,
) -> None:
    """Update the kept weights and their moments in place (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1).

    `weight` and `gradient` are (rows, channels), both fp32 or both bf16. `bits` is a mask as from `pack_mask` that
    keeps the same number of weights in each row, and the moments `mean` and `square` are (rows, kept) of the weights'
    type. `step` is the number of the step, from 1. Arithmetic is in fp32. Weights in bf16 are rounded stochastically,
    so that on average a step smaller than their spacing is not lost; `seed`, from 0 to 2**32 - 1, has to differ from
    step to step. Raises `PermpruneError` if the tensors do not match.
    """
    tensors, kept = (weight, gradient, mean, square), mean.shape[1]
    fits = gradient.shape == weight.shape and mean.shape == square.shape == (len(weight), kept)
    fits &= bits.shape == (len(weight), -(-weight.shape[1] // 8)) and len({tensor.dtype for tensor in tensors}) == 1
    if not fits or weight.dtype not in (torch.float32, torch.bfloat16):
        raise PermpruneError(
            "a step of Adam needs a weight, a gradient, a mask and moments that match, in fp32 or bf16"
        )
    first, second = betas
    rate, root = rate / (1 - first**step), 1 / math.sqrt(1 - second**step)
    contiguous = all(tensor.is_contiguous() and tensor.is_cpu for tensor in (*tensors, bits))
    if not (contiguous and library.available()):
        mask = unpack_mask(bits, weight.shape[1])
        kept_gradient = gradient[mask].float().view_as(mean)
        new_mean = mean.float().mul_(first).add_(kept_gradient, alpha=1 - first)
        new_square = square.float().mul_(second).addcmul_(kept_gradient, kept_gradient, value=1 - second)
        mean.copy_(new_mean)
        square.copy_(new_square)
        value = weight[mask].float().sub_((new_mean * rate / (new_square.sqrt() * root + EPSILON)).flatten())
        weight[mask] = value if weight.dtype == torch.float32 else rounded(value, seed)
        return
    library.run(
        "step",
        weight.numel(),
        weight=weight,
        gradient=gradient,
        bits=bits,
        mean=mean,
        square=square,
        rows=len(weight),
        width=weight.shape[1],
        kept=kept,
        rate=rate,
        first=first,
        second=second,
        root=root,
        least=EPSILON,
        seed=seed,
        number=library.NUMBERS[weight.dtype],
    )
