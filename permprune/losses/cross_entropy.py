"""Losses of logits in chunks of terms: with a large vocabulary, fp32 copies of all logits would take gigabytes.

The gradient is computed with the loss, while a chunk is in the processor's cache: both need the same exponentials. Of
`Projected` logits neither all logits nor all their gradients are ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.examples import Examples
from permprune.models.forward import run_model
from permprune.models.hooks import computing

AT_ONCE = 2**20
"""Number of logits that are held in fp32 at a time."""

PROJECTED = 256
"""Number of terms whose logits are computed at a time if they are `Projected`."""

_OTHERWISE: WeakSet[nn.Module] = WeakSet()
"""Models known to compute their logits otherwise than as the products of a linear layer, such as with a soft cap."""


def cross_entropy(logits: Logits, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label], computed in fp32 and summed over the terms.

    `logits` is (terms, classes), `labels` is int64 (terms,). For the backward pass only the gradient is saved, that of
    the logits, or of the hidden states from which they are projected, in their type.
    """
    return distilled_cross_entropy(logits, labels, None, label_weight=1.0, divergence_weight=0.0)


def divergence(logits: Logits, target: Logits) -> Tensor:
    """Return the KL divergence of softmax(logits) from softmax(target), computed in fp32 and summed over the terms.

    Both are (terms, classes); only `logits` get a gradient, which is saved as in `cross_entropy`.
    """
    return distilled_cross_entropy(logits, None, target, label_weight=0.0, divergence_weight=1.0)


def distilled_cross_entropy(
    logits: Logits, labels: Tensor | None, target: Logits | None, *, label_weight: float, divergence_weight: float
) -> Tensor:
    """Return the weighted sum of `cross_entropy` and `divergence`, in two thirds of the time of the two.

    This is the loss of knowledge distillation (Hinton et al. 2015, arXiv 1503.02531, section 2) at a temperature of 1.
    Without labels or without a target, their weight has to be 0.
    """
    values = logits.hidden if isinstance(logits, Projected) else logits
    weights = label_weight, divergence_weight
    total: Tensor = _Losses.apply(values, logits, labels, target, *weights)  # type: ignore[no-untyped-call]
    return total


class _Losses(torch.autograd.Function):
    """The losses, with a gradient of `values`: the logits or, if these are projected, their hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        logits: Logits,
        labels: Tensor | None,
        target: Logits | None,
        of_labels: float,
        of_target: float,
    ) -> Tensor:
        slope = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        logits, target = _converted(logits, target)
        projected = logits if isinstance(logits, Projected) else None
        whole = projected is None and not isinstance(target, Projected)
        losses = [values.new_zeros((), dtype=torch.float32)]
        for rows in _chunks(len(values), len(values) if whole else PROJECTED):
            chunk = _rows(logits, rows)
            losses += _chunk_losses(
                chunk,
                None if labels is None else labels[rows],
                None if target is None else _rows(target, rows),
                None if slope is None else slope[rows] if projected is None else chunk,
                of_labels=of_labels,
                of_target=of_target,
            )
            if projected is not None and slope is not None:
                slope[rows] = chunk @ projected.weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(gradients[0]), None, None, None, None, None


def _chunk_losses(
    logits: Tensor,
    labels: Tensor | None,
    target: Tensor | None,
    slope: Tensor | None,
    *,
    of_labels: float,
    of_target: float,
) -> Iterator[Tensor]:
    """Yield the losses of one chunk of terms after the other, and write the gradient to `slope`, if given.

    `slope` may be `logits`, which are then overwritten.
    """
    for rows in _chunks(len(logits), max(1, AT_ONCE // logits.shape[1])):
        log_shares = logits[rows].log_softmax(1, dtype=torch.float32)
        terms = torch.arange(len(log_shares), device=log_shares.device)
        if labels is not None:
            yield -of_labels * log_shares[terms, labels[rows]].sum()
        if target is not None:
            target_log_shares = target[rows].log_softmax(1, dtype=torch.float32)
            target_shares = target_log_shares.exp()
            yield of_target * torch.dot(target_shares.flatten(), target_log_shares.sub_(log_shares).flatten())
        if slope is None:
            continue
        gradient = log_shares.exp_().mul_(of_labels + of_target)
        if target is not None:
            gradient.sub_(target_shares, alpha=of_target)
        if labels is not None:
            gradient[terms, labels[rows]] -= of_labels
        slope[rows] = gradient


def _converted(logits: Logits, target: Logits | None) -> tuple[Logits, Logits | None]:
    """The same, with weights in the type of the hidden states; a weight that both share is converted once."""
    if not isinstance(logits, Projected):
        return logits, target.converted() if isinstance(target, Projected) else target
    converted = logits.converted()
    if not isinstance(target, Projected):
        return converted, target
    shared = target.weight is logits.weight and target.hidden.dtype == logits.hidden.dtype
    return converted, replace(converted, hidden=target.hidden) if shared else target.converted()


def _rows(logits: Logits, rows: slice) -> Tensor:
    return logits[rows].whole() if isinstance(logits, Projected) else logits[rows]


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` of `count` terms."""
    return (slice(start, start + size) for start in range(0, count, max(1, size)))


@dataclass(frozen=True)
class Projected:
    """Logits (..., classes): `hidden` (..., channels) times the transposed `weight` (classes, channels), plus `bias`.

    `weight` is as the model holds it, and is used in the type of `hidden`. Indices select terms, as of the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, terms: Any) -> Projected:
        return replace(self, hidden=self.hidden[terms])

    def flatten(self, first: int, last: int) -> Projected:
        return replace(self, hidden=self.hidden.flatten(first, last))

    def to(self, device: torch.device) -> Projected:
        return replace(self, hidden=self.hidden.to(device))

    def detach(self) -> Projected:
        return replace(self, hidden=self.hidden.detach())

    def converted(self) -> Projected:
        """The same logits, with weight and bias in the type of the hidden states."""
        dtype = self.hidden.dtype
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def whole(self) -> Tensor:
        """Compute the logits."""
        ready = self.converted()
        return F.linear(ready.hidden, ready.weight, ready.bias)


Logits = Tensor | Projected
"""Logits of any floating type, in memory or projected."""


def compute_logits(model: nn.Module, batch: Examples) -> Logits:
    """Run a model on a batch; returns its logits (batch, length, classes), projected where that is possible."""
    projected = project(model, batch)
    logits: Logits = run_model(model, batch).logits if projected is None else projected
    return logits


def project(model: nn.Module, batch: Examples) -> Projected | None:
    """Run a model up to its output layer, and return its logits (batch, length, classes).

    Returns None if they are not the products of a plain linear layer without gradients, or if the model changes them;
    it may have run in vain then, the first time.
    """
    head = _output_layer(model)
    if head is None or model in _OTHERWISE:
        return None
    with _skipped(head) as calls:
        logits = run_model(model, batch).logits
    if len(calls) != 1 or calls[0][1] is not logits or calls[0][2] != logits._version:
        _OTHERWISE.add(model)
        return None
    return calls[0][0]


def _output_layer(model: nn.Module) -> nn.Linear | None:
    """The output layer, if it is a plain linear layer that requires no gradient."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if (
        type(head) is not nn.Linear
        or "forward" in vars(head)
        or any(weight.requires_grad for weight in head.parameters())
    ):
        return None
    return head


@contextmanager
def _skipped(head: nn.Linear) -> Iterator[list[tuple[Projected, Tensor, int]]]:
    """A context in which a linear layer computes nothing; yields what it would have computed, and what it returned.

    What changes that shows: the model's logits are then another tensor, or have another version than the one yielded.
    Hooks run as ever.
    """
    calls: list[tuple[Projected, Tensor, int]] = []
    weight, bias = head.weight, head.bias  # as the model holds them: while the layer runs, hooks may show copies

    def forward(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.inference_mode(False):  # whose tensors have no version
            returned = hidden.new_zeros((*hidden.shape[:-2], 1, len(weight)), dtype=dtype)
        calls.append((Projected(hidden.to(dtype), weight, bias), returned, returned._version))
        return returned

    with computing({head: forward}):
        yield calls
