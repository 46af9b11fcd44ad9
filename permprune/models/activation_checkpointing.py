"""Activation checkpointing: blocks that keep only their inputs and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, update_wrapper

from torch import nn
from torch.utils.checkpoint import checkpoint

from permprune.models.layers import blocks

_again = ContextVar("again", default=False)


@contextmanager
def recomputed(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Each repeated block that runs inside runs again in the backward pass.

    Of its activations only its inputs are kept meanwhile: slower, less memory, the same gradients. Hooks of a block
    itself fire once, those of the modules in it once more when it runs again, which `recomputing` tells them. Unless
    `active` nothing changes.
    """
    own = {block: vars(block).get("forward") for block in blocks(model)} if active else {}
    for block in own:
        again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=_contexts)
        block.forward = update_wrapper(again, block.forward)
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def recomputing() -> bool:
    """Whether the block under way runs again, on activations that its first run has shown."""
    return _again.get()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a block's first run and around the second."""
    return nullcontext(), _second_run()


@contextmanager
def _second_run() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
