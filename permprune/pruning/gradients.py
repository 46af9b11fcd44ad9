"""Gradients of the weights of layers, collected from backward passes one parameter at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.kernels.adam.rounding import add_rounded_
from permprune.models.activation_checkpointing import recomputed
from permprune.models.forward import frozen, requiring_gradients
from permprune.models.hooks import attached
from permprune.system import distributed
from permprune.system.shelf import Shelf

SEED_STEP = 0x27D4EB2F
"""The difference of the seeds of one sum in bf16 and the next."""

Parameters = Mapping[str, nn.Parameter]
"""Parameters of a model by name."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss over some examples at the current masks, by layer.

    `weight[layer]` is dLoss/dW_eff (rows, channels), of the narrower of two types: that of activations, and that of the
    weight as it is held. `fisher[layer]` (rows,) is the Fisher information as in `Statistics`, averaged over the
    `count` terms of this loss and multiplied by the loss's `curvature`. `loss` is the mean loss. If each example has
    one label, `covariance[layer]` (rows, rows) is the `row_covariance` of layers that are not too wide; its diagonal is
    `fisher`. `stored` are the gradients of the parameters, from which those in `weight` are read.
    """

    weight: Mapping[str, Tensor]
    fisher: dict[str, Tensor]
    loss: float
    count: int
    covariance: dict[str, Tensor] = field(default_factory=dict)
    stored: Shelf = field(default_factory=Shelf)

    def discounted(self, weight: float) -> Gradients:
        """Return these gradients with this share of their weight in later means."""
        return replace(self, count=round(self.count * weight))


@contextmanager
def differentiable(model: nn.Module, parameters: Parameters, recompute: bool) -> Iterator[None]:
    """A context in which backward passes give these parameters gradients, and no others.

    `recompute` turns on activation checkpointing.
    """
    with frozen(model), recomputed(model, recompute), requiring_gradients(parameters.values()):
        yield


@contextmanager
def received(parameters: Parameters, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A context in which `receive` gets the name and the gradient of each parameter from a batch's backward pass.

    It comes as soon as it is known, and the parameter does not keep it.
    """

    def hand(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = cast(Tensor, parameter.grad), None
        receive(name, gradient)

    hooks = (one.register_post_accumulate_grad_hook(partial(hand, name)) for name, one in parameters.items())
    with attached(hooks):
        yield


class GradientSums:
    """The sums of gradients over batches and ranks, by the names of the parameters, on the shelf `sums`.

    They are kept in the narrower of the parameter's type and `dtype`, that of activations. With a `seed`, which is the
    same on all ranks, sums in bf16 are rounded stochastically.
    """

    def __init__(self, parameters: Parameters, dtype: torch.dtype, sums: Shelf, *, seed: int | None = None) -> None:
        self.parameters, self.dtype, self.sums, self.seed = parameters, dtype, sums, seed
        self._added = itertools.count(1)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a batch's gradient of a parameter."""
        if name not in self.sums:
            self.sums[name] = gradient.to(self._type_of(gradient)).contiguous()
            return
        total = self.sums[name]
        if self.seed is not None and total.dtype == torch.bfloat16:
            add_rounded_(total, gradient, (self.seed + next(self._added) * SEED_STEP) % 2**32)
        else:
            total += gradient
        self.sums[name] = total

    def mean(self, terms: int, ran: bool) -> Shelf:
        """Add the sums of all ranks, divide them by `terms`, in place, and return them.

        `ran` is whether this rank ran any examples; if so, raises `PermpruneError` for a parameter without a gradient.
        """
        for number, (name, parameter) in enumerate(self.parameters.items()):
            if name not in self.sums:
                if ran:
                    raise PermpruneError(
                        f"{name.removesuffix('.weight')} has no effect on the loss: "
                        "exclude it, or calibrate with inputs that use it"
                    )
                self.sums[name] = torch.zeros_like(parameter, dtype=self._type_of(parameter))
            total = self.sums[name]
            rounded = self.seed is not None and total.dtype == torch.bfloat16
            if rounded and distributed.world() > distributed.shards():
                exact = total.float()
                distributed.add_([exact])
                add_rounded_(total.zero_(), exact, (cast(int, self.seed) - number * SEED_STEP) % 2**32)
            else:
                distributed.add_([total])
            total /= terms
            self.sums[name] = total
        return self.sums

    def _type_of(self, weight: Tensor) -> torch.dtype:
        return self.dtype if self.dtype.itemsize < weight.dtype.itemsize else weight.dtype
