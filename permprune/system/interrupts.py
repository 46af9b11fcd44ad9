"""Handling of Ctrl-C while the program is still starting."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """A context, for use inside `leaving_on_interrupt`, in which Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """A context in which Ctrl-C ends the program at once, with one line and status 130.

    Importing what a command needs takes seconds, during which `KeyboardInterrupt` could be raised anywhere in other
    packages, and some of them catch it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # for instance ignored, under nohup
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: object) -> None:
    # a line of progress may stand there, with the cursor hidden
    shown = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""
    os.write(2, shown + b"permprune: interrupted\n")
    os._exit(130)
