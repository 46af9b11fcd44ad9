"""Losses of logits in chunks of terms: with a large vocabulary, fp32 copies of all logits would take gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**20
"""Number of logits that are held in fp32 at a time."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label], computed in fp32 and summed over the terms.

    `logits` is (terms, classes) of any floating type, `labels` is int64 (terms,). For the backward pass only the logits
    and labels are saved, and no other tensor of their size.
    """
    total: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return total


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the KL divergence of softmax(logits) from softmax(target), computed in fp32 and summed over the terms.

    Both are (terms, classes) of any floating type; only `logits` get a gradient. For the backward pass only the two are
    saved, and no other tensor of their size.
    """
    total: Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        parts = [F.cross_entropy(own.float(), right, reduction="sum") for own, right in _parts(logits, labels)]
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        slope = torch.empty_like(logits)
        for out, own, right in _parts(slope, logits, labels):
            shares = own.softmax(1, dtype=torch.float32)
            shares[torch.arange(len(right), device=right.device), right] -= 1
            out.copy_(shares.mul_(gradients[0]))
        return slope, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        parts = []
        for own, right in _parts(logits, target):
            own, right = own.log_softmax(1, dtype=torch.float32), right.log_softmax(1, dtype=torch.float32)
            parts.append(F.kl_div(own, right, reduction="sum", log_target=True))
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        slope = torch.empty_like(logits)
        for out, own, right in _parts(slope, logits, target):
            shares = own.softmax(1, dtype=torch.float32)
            out.copy_(shares.sub_(right.softmax(1, dtype=torch.float32)).mul_(gradients[0]))
        return slope, None


def _parts(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors, the first (terms, classes), into chunks of at most `AT_ONCE` logits, or of one term."""
    count = max(1, AT_ONCE // first.shape[1])
    return zip(*(tensor.split(count) for tensor in (first, *others)), strict=True)
