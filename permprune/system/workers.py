"""How worker processes start."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


def worker_context(module: str) -> ForkServerContext | SpawnContext:
    """Return the context in which to start worker processes: they share no state with this process.

    Where the system can, they are forked from a process that has imported `module`, which defines what workers run: its
    imports take seconds. Elsewhere each worker imports it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
