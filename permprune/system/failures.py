"""Failures as errors of permprune: memory that runs out, processes that end, and Ctrl-C or SIGTERM."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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
    "set": "fewer examples at a time (--set batch=1), --set recompute=true",
    "batch": "fewer examples at a time (--batch 1)",
    "memory": "a limit such as --memory 8GiB",
    "length": "shorter windows (--length)",
    "windows": "fewer windows (--windows)",
}
"""Advice by option that reduces the memory of a command; for commands without one the advice is a larger machine."""

ENDED = "another process of this run has ended: see what it printed, then repeat the command with --resume"
"""What a process prints before it ends because another one has."""

INTERRUPTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
"""The signals that interrupt, with what handles them if nobody else does."""

if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's SIGTERM has to end a process that waits outside Python, too
    INTERRUPTS[signal.SIGTERM] = signal.SIG_DFL


class OutOfMemory(PermpruneError):
    """Raised if memory runs out; `peak` is the largest resident memory so far, in MiB, or None if it is unknown."""

    def __init__(self, peak: float | None, options: Collection[str] | None = None) -> None:
        self.peak = peak
        options = ADVICE.keys() - {"batch"} if options is None else options
        wanted = [advice for option, advice in ADVICE.items() if option in options]
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
    """A context, for use inside `leaving_on_interrupt`, in which Ctrl-C raises `KeyboardInterrupt` again.

    So does SIGTERM. The argument of the error is the signal's number.
    """
    return _handled(_interrupt, instead_of=dict.fromkeys(INTERRUPTS, _leave))


def leaving_on_interrupt() -> AbstractContextManager[None]:
    """A context in which Ctrl-C and SIGTERM end the program at once, with one line and status 130 or 143.

    Importing what a command needs takes seconds, during which `KeyboardInterrupt` could be raised anywhere in other
    packages, and some of them catch it. Where Ctrl-C is ignored, as under nohup, it stays so.
    """
    return _handled(_leave, instead_of=INTERRUPTS)


@contextmanager
def _handled(handler: Callable[..., object], *, instead_of: Mapping[int, Any]) -> Iterator[None]:
    replaced = [number for number, before in instead_of.items() if signal.getsignal(number) is before]
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, instead_of[number])


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _leave(number: int, _: object) -> None:
    # a line of progress may stand there, with the cursor hidden
    shown = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""
    os.write(2, shown + b"permprune: interrupted\n")
    os._exit(128 + number)


def _end_on_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) in (_interrupt, _leave):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # children do not say that the program is interrupted if it ends them
    os.register_at_fork(after_in_child=_end_on_sigterm)
