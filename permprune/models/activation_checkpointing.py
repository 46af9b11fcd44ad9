"""Activation checkpointing: blocks store only their inputs and are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, update_wrapper

from torch import nn
from torch.utils.checkpoint import checkpoint

from permprune.models.autocast import BlockwiseAttention
from permprune.models.hooks import computing
from permprune.models.layers import blocks

_again = ContextVar("again", default=False)


@contextmanager
def recomputed(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Context manager that applies activation checkpointing to the model's repeated blocks.

    Between the forward and the backward pass, a block keeps only its inputs, and the backward pass runs it again. This
    saves memory, costs time, and leaves the gradients unchanged. Hooks on a block itself fire once; hooks on modules
    inside it fire again during the recomputation, which they can detect with `recomputing`. Does nothing if `active` is
    False.
    """
    again = partial(partial, checkpoint, use_reentrant=False, context_fn=_contexts)
    with computing({one: update_wrapper(again(one.forward), one.forward) for one in blocks(model) if active}):
        yield


def recomputing() -> bool:
    """Whether the current forward pass of a block is a recomputation, so its activations have been seen before."""
    return _again.get()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a block's first forward pass and for its recomputation (`context_fn` of `checkpoint`)."""
    return nullcontext(), _second_run(BlockwiseAttention() if BlockwiseAttention.is_active() else nullcontext())


@contextmanager
def _second_run(attention: AbstractContextManager[object]) -> Iterator[None]:
    """The recomputation runs in the backward pass, where the attention of the first run is no longer in effect."""
    token = _again.set(True)
    try:
        with attention:
            yield
    finally:
        _again.reset(token)
