"""Progress bars on stderr, and the logger of the package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("permprune")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging
console = Console(stderr=True)
T = TypeVar("T")

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
_shown = True


def enable_progress_bars() -> None:
    """Show progress bars on stderr if it is a terminal; this is the default."""
    global _shown
    _shown = True


def disable_progress_bars() -> None:
    """Show no progress bars; the logger "permprune" is not affected."""
    global _shown
    _shown = False


def track(items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]:
    """Yield `items` and show a progress bar with `label`, if stderr is a terminal."""
    with _progress() as progress:
        yield from progress.track(items, description=label, total=total)


@contextmanager
def bar(label: str, total: int, completed: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A context with a progress bar for `total` steps; yields a function of (completed, label) that updates it."""
    with _progress() as progress:
        task = progress.add_task(label, total=total, completed=completed)
        yield lambda done, text: progress.update(task, completed=done, description=text)


def _progress() -> Progress:
    shown = _shown and (console.is_terminal or console.is_jupyter)  # elsewhere rich prints an empty line for each bar
    return Progress(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True, disable=not shown)
