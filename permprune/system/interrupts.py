"""Ctrl-C while the program is not yet there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` again, where `leaving_on_interrupt` had it end the program."""
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
    """Inside, Ctrl-C ends the program at once, with one line and status 130.

    Importing what a command needs takes seconds, in which an exception could rise anywhere in other packages: some
    catch it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # ignored, as behind nohup
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: object) -> None:
    os.write(2, b"permprune: interrupted\n")
    os._exit(130)
