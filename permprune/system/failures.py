"""Failures as errors of permprune: memory that runs out, processes that end, and Ctrl-C while a program is starting."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

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

ENDED = "another process of this run has ended: see what it printed, then repeat the command with --resume"
"""What a process prints before it ends because another one has."""


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


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective operation means that another process has ended."""
    by_its_class = isinstance(error, getattr(sys.modules.get("torch.distributed"), "DistError", ()))
    return by_its_class or (isinstance(error, RuntimeError) and "gloo/" in str(error))  # which has no class of errors


@contextmanager
def failures_reported() -> Iterator[None]:
    """A context or decorator that raises a `PermpruneError` in place of errors that mean a failure of the system.

    If memory ran out that is `OutOfMemory`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory):
            raise
        if is_out_of_memory(error):
            raise OutOfMemory(peak_memory_mb()) from error
        if is_lost_connection(error):
            raise PermpruneError(ENDED) from error
        raise


def interruptible() -> AbstractContextManager[None]:
    """A context, for use inside `leaving_on_interrupt`, in which Ctrl-C raises `KeyboardInterrupt` again."""
    return _handled(signal.default_int_handler, instead_of=_leave)


def leaving_on_interrupt() -> AbstractContextManager[None]:
    """A context in which Ctrl-C ends the program at once, with one line and status 130.

    Importing what a command needs takes seconds, during which `KeyboardInterrupt` could be raised anywhere in other
    packages, and some of them catch it. Where Ctrl-C is ignored, as under nohup, it stays so.
    """
    return _handled(_leave, instead_of=signal.default_int_handler)


@contextmanager
def _handled(handler: Callable[..., object], *, instead_of: Callable[..., object]) -> Iterator[None]:
    if signal.getsignal(signal.SIGINT) is not instead_of:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, instead_of)


def _leave(*_: object) -> None:
    # a line of progress may stand there, with the cursor hidden
    shown = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""
    os.write(2, shown + b"permprune: interrupted\n")
    os._exit(130)
