"""Hooks on layers, which see what the layers read and compute whenever they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.models.experts import ExpertMatrix, Routed, Whole, routed_only, run_in_turn
from permprune.models.layers import Layer

Before = Callable[[Layer, Tensor, Routed | None], Tensor | None]
"""Called with (layer, inputs, tokens) before a layer runs; returns the inputs to use instead, or None.

The tokens are those of an expert's inputs, and None for other layers.
"""

After = Callable[[Layer, Tensor, Routed | None, Tensor], None]
"""Called with (layer, inputs, tokens, outputs) after a layer has run."""


@contextmanager
def hooked(
    layers: Iterable[Layer], *, before: Before | None = None, after: After | None = None, whole: Whole = routed_only
) -> Iterator[None]:
    """Context manager: `before` and `after` are called whenever one of the layers runs.

    Experts run one after the other, on all tokens where `whole` says so (see `run_in_turn`). With `after`, a layer that
    does not return a tensor raises `PermpruneError`.
    """
    handles, layers = [], list(layers)
    for layer in layers:
        if before is not None:
            handles.append(layer.module.register_forward_pre_hook(partial(_before, layer, before)))
        if after is not None:
            handles.append(layer.module.register_forward_hook(partial(_after, layer, after)))
    matrices = [layer.module for layer in layers if isinstance(layer.module, ExpertMatrix)]
    try:
        with run_in_turn([matrix.experts for matrix in matrices], whole):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _before(layer: Layer, call: Before, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    inputs = call(layer, args[0], _routed(layer, args))
    return None if inputs is None else (inputs, *args[1:])


def _after(layer: Layer, call: After, module: nn.Module, args: tuple[Any, ...], outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        kind = type(module).__name__
        raise PermpruneError(f"{layer.name} is a {kind}, which returns more than a linear layer: exclude it")
    call(layer, args[0], _routed(layer, args), outputs)


def _routed(layer: Layer, args: tuple[Any, ...]) -> Routed | None:
    return None if layer.expert is None else args[1]
