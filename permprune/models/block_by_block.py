"""Forward passes that change the layers of one repeated block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

from torch import nn

from permprune.models.hooks import attached
from permprune.models.layers import Layer, blocks
from permprune.system.progress import track

Visit = Callable[[list[Layer], Callable[[], Any]], None]
"""Called with the layers of a block and a function that runs the block on its inputs."""


@contextmanager
def block_by_block(model: nn.Module, layers: Iterable[Layer], visit: Visit, name: str) -> Iterator[None]:
    """Context manager: a forward pass calls `visit` before each block first runs, and ends after the last of them.

    The block then runs as `visit` left it, so that the next one reads what it computes. Layers of a module that blocks
    share belong to the first; those outside of the blocks are left out. `name` is shown with the progress.
    """
    waiting = _layers_by_block(model, layers)
    bar = track(list(waiting), name)

    def reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = waiting.pop(block, None)
        if own is None:  # a block that runs again
            return
        next(bar)
        visit(own, partial(block.forward, *args, **kwargs))  # calling `block` would run this hook again
        if not waiting:
            raise _AllVisited

    hooks = [block.register_forward_pre_hook(reach, with_kwargs=True) for block in waiting]
    with attached(hooks), closing(bar), suppress(_AllVisited):
        yield


class _AllVisited(Exception):
    """Ends the forward pass after the last block was visited."""


def _layers_by_block(model: nn.Module, layers: Iterable[Layer]) -> dict[nn.Module, list[Layer]]:
    block_of = {module: block for block in reversed(blocks(model)) for module in block.modules()}
    found: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        if layer.owner in block_of:
            found.setdefault(block_of[layer.owner], []).append(layer)
    return found
