"""Logits that are not computed until a loss needs them: with a large vocabulary they are the largest tensors of all.

The loss computes them a few hundred terms at a time from the inputs of the output layer, and its gradient with respect
to these inputs together with it, so that neither the logits nor their gradient are ever in memory as a whole (as in
Liger Kernel, Hsu et al. 2024, arXiv 2410.10989). The output layer itself gets no gradient.
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

_OTHERWISE: WeakSet[nn.Module] = WeakSet()
"""Models known to compute their logits otherwise than as the products of a linear layer, such as with a soft cap."""


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

    Returns None if they are not the products of a plain linear layer without gradients; the model may have run in vain
    then, the first time.
    """
    head = _output_layer(model)
    if head is None or model in _OTHERWISE:
        return None
    with _skipped(head) as calls:
        logits = run_model(model, batch).logits
    if len(calls) != 1 or calls[0][1] is not logits:
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
def _skipped(head: nn.Linear) -> Iterator[list[tuple[Projected, Tensor]]]:
    """A context in which a linear layer computes nothing; yields what it would have computed, and what it returned.

    Its hooks run as ever: one that changes what is returned shows, as the model's logits are then another tensor.
    """
    calls: list[tuple[Projected, Tensor]] = []
    weight, bias = head.weight, head.bias  # as the model holds them: while the layer runs, hooks may show copies

    def forward(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        returned = hidden.new_zeros((*hidden.shape[:-2], 1, len(weight)), dtype=dtype)
        calls.append((Projected(hidden.to(dtype), weight, bias), returned))
        return returned

    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield calls
    finally:
        del head.forward
