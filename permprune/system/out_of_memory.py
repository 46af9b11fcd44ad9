"""Errors for running out of memory, with advice."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from permprune.errors import PermpruneError
from permprune.system.memory import peak_memory_mb

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)
"""Messages of torch, CUDA, C++ and the system, in lower case."""

ADVICE: Mapping[str, str] = {
    "batch": "fewer examples at a time (--batch 1)",
    "recompute": "--recompute",
    "memory": "a limit such as --memory 8GiB",
    "length": "shorter windows (--length)",
    "windows": "fewer windows (--windows)",
}
"""Advice by option that reduces the memory of a command; for commands without one the advice is a larger machine."""


class OutOfMemory(PermpruneError):
    """Raised if memory runs out; `peak` is the largest resident memory so far, in MiB, or None if it is unknown."""

    def __init__(self, peak: float | None, options: Collection[str] | None = None) -> None:
        self.peak = peak
        wanted = [advice for option, advice in ADVICE.items() if options is None or option in options]
        reached = "" if peak is None else f" (peak so far: {peak:,.0f} MiB)"
        super().__init__(
            f"out of memory{reached}: " + (f"give {', '.join(wanted)}" if wanted else "use a machine with more memory")
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemory)) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_reported() -> Iterator[None]:
    """A context or decorator that raises `OutOfMemory` in place of any error which means that memory ran out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(peak_memory_mb()) from error
