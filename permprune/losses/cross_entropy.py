"""Losses of logits in chunks of terms: with a large vocabulary, fp32 copies of all logits would take gigabytes.

The gradient is computed with the loss, while a chunk is in the processor's cache: both need the same exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**20
"""Number of logits that are held in fp32 at a time."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label], computed in fp32 and summed over the terms.

    `logits` is (terms, classes) of any floating type, `labels` is int64 (terms,). For the backward pass only the
    gradient is saved, in the type of the logits, and no other tensor of their size.
    """
    total: Tensor = _Losses.apply(logits, labels, None, 1.0, 0.0)  # type: ignore[no-untyped-call]
    return total


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the KL divergence of softmax(logits) from softmax(target), computed in fp32 and summed over the terms.

    Both are (terms, classes) of any floating type; only `logits` get a gradient, which is saved as in `cross_entropy`.
    """
    total: Tensor = _Losses.apply(logits, None, target, 0.0, 1.0)  # type: ignore[no-untyped-call]
    return total


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, target: Tensor, *, label_weight: float, divergence_weight: float
) -> Tensor:
    """Return the weighted sum of `cross_entropy` and `divergence`, in two thirds of the time of the two.

    This is the loss of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531, section 2) at a temperature of 1.
    """
    weights = label_weight, divergence_weight
    total: Tensor = _Losses.apply(logits, labels, target, *weights)  # type: ignore[no-untyped-call]
    return total


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, target: Tensor | None, of_labels: float, of_target: float
    ) -> Tensor:
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = [logits.new_zeros((), dtype=torch.float32)]
        for at in _chunks(logits):
            own = logits[at].log_softmax(1, dtype=torch.float32)
            terms = torch.arange(len(own), device=own.device)
            if labels is not None:
                losses.append(-of_labels * own[terms, labels[at]].sum())
            if target is not None:
                wanted = target[at].log_softmax(1, dtype=torch.float32)
                shares = wanted.exp()
                losses.append(of_target * torch.dot(shares.flatten(), wanted.sub_(own).flatten()))
            if slope is None:
                continue
            own.exp_().mul_(of_labels + of_target)
            if target is not None:
                own.sub_(shares, alpha=of_target)
            if labels is not None:
                own[terms, labels[at]] -= of_labels
            slope[at] = own
        if slope is not None:
            ctx.save_for_backward(slope)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(gradients[0]), None, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield the terms of each chunk: at most `AT_ONCE` logits, or one term."""
    count = max(1, AT_ONCE // logits.shape[1])
    return (slice(start, start + count) for start in range(0, len(logits), count))
