"""Which positions of a batch are padding, told to the hooks of the modules that it passes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_masks: ContextVar[tuple[Tensor, ...]] = ContextVar("masks", default=())


@contextmanager
def padded(*masks: Tensor | None) -> Iterator[None]:
    """Inside, activations of the shape of one of these masks are padding where it is 0; None stands for no mask.

    Masks are (batch, length), each of another shape.
    """
    token = _masks.set(tuple(mask.bool() for mask in masks if mask is not None))
    try:
        yield
    finally:
        _masks.reset(token)


def mask_of(x: Tensor) -> Tensor | None:
    """Where activations x, (batch, length, channels) or (batch * length, channels), are real; None: everywhere."""
    for mask in _masks.get():
        if x.shape[:-1] in (mask.shape, (mask.numel(),)):
            return mask.reshape(x.shape[:-1])
    return None


def real(x: Tensor) -> Tensor:
    """The activations that are no padding, (positions, channels); x as it is where all are real."""
    mask = mask_of(x)
    return x if mask is None else x[mask]
