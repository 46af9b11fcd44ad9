"""Weights that rest elsewhere while their modules do not run: a parameter has their shape, type and device alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VALUES = "_permprune_values"
"""Attribute of a parameter that rests elsewhere: a function that returns its values, where they rest."""


def at_rest(values: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter that rests elsewhere, with values that are read each time they are used.

    All its elements are one NaN, so that code that does not read them as `values_of` cannot go unnoticed.
    """
    everywhere = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
    parameter = nn.Parameter(everywhere, requires_grad=False)
    setattr(parameter, VALUES, values)
    return parameter


def rests(parameter: Tensor) -> bool:
    """Whether the values of a parameter rest elsewhere."""
    return hasattr(parameter, VALUES)


def values_of(parameter: Tensor, part_of: Callable[[Tensor], Tensor] = lambda whole: whole) -> Tensor:
    """Return the values of a parameter, or the part of them that `part_of` takes.

    Of one that rests elsewhere they are a copy in its type and on its device.
    """
    values: Callable[[], Tensor] | None = getattr(parameter, VALUES, None)
    if values is None:
        return part_of(parameter.data)
    return part_of(values()).to(parameter.device, parameter.dtype, copy=True)
