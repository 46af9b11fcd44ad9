"""Ctrl-C while the program is not yet there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Inside, Ctrl-C ends the program `permprune` at once, with one line and status 130; other programs go on as ever.

    Importing what a command needs takes seconds, in which an exception could rise anywhere in other packages: some
    catch it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not _is_program() or handler is not signal.default_int_handler:  # ignored, as behind nohup
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _is_program() -> bool:
    """Whether Python was started as `permprune` or as `python -m permprune`."""
    started = Path(sys.argv[0] if getattr(sys, "argv", None) else "")
    if started.name == "-m":  # as long as the package itself is imported
        return "permprune" in sys.orig_argv
    return "permprune" in (started.stem, started.parent.name if started.name == "__main__.py" else "")


def _leave(*_: object) -> None:
    os.write(2, b"permprune: interrupted\n")
    os._exit(130)
