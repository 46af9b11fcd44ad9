"""Cross-entropy over many classes, a few terms at a time: for large vocabularies its copies take gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**20
"""Logits that are held in fp32 at a time."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in fp32, summed over the terms.

    `logits` (terms, classes) of any floating type, `labels` int64 (terms,). Nothing of the size of the logits is kept
    for the backward pass but they themselves.
    """
    total: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
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
        for (out, right), (own, _) in zip(_parts(slope, labels), _parts(logits, labels), strict=True):
            shares = own.softmax(1, dtype=torch.float32)
            shares[torch.arange(len(right), device=right.device), right] -= 1
            out.copy_(shares.mul_(gradients[0]))
        return slope, None


def _parts(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits and labels of a few terms after the other."""
    count = max(1, AT_ONCE // logits.shape[1])
    return zip(logits.split(count), labels.split(count), strict=True)
