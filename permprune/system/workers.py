"""How worker processes start."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
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


@contextmanager
def without_main() -> Iterator[None]:
    """A context in which started worker processes do not run the caller's script again.

    They would, to define what it defines; a script whose work is not under `if __name__ == "__main__":` would start
    workers of its own, which Python refuses. Nothing that the script defines can be sent to them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
