"""How long work shows where it is: one rich bar on stderr, one logger."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("permprune")
log.addHandler(logging.NullHandler())  # what is not asked for is not printed
console = Console(stderr=True)
T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]:
    """Yield `items` while a bar named `label` runs; on a stream that is no terminal only the log speaks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield from bar.track(items, description=label, total=total)
