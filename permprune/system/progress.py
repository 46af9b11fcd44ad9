"""How long work shows where it is: one rich bar on stderr, one logger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("permprune")
log.addHandler(logging.NullHandler())  # what is not asked for is not printed
console = Console(stderr=True)
T = TypeVar("T")

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
_shown = True


def enable_progress_bars() -> None:
    """Show progress bars on stderr where it is a terminal, as is the default."""
    global _shown
    _shown = True


def disable_progress_bars() -> None:
    """Show no progress bars; the logger "permprune" goes on telling what was decided."""
    global _shown
    _shown = False


def track(items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]:
    """Yield `items` while a bar named `label` runs; on a stream that is no terminal only the log speaks."""
    with _progress() as progress:
        yield from progress.track(items, description=label, total=total)


@contextmanager
def bar(label: str, total: int, completed: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar for work of `total` steps, some of them completed; the function yielded takes (completed, label)."""
    with _progress() as progress:
        task = progress.add_task(label, total=total, completed=completed)
        yield lambda done, text: progress.update(task, completed=done, description=text)


def _progress() -> Progress:
    return Progress(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True, disable=not _shown)
