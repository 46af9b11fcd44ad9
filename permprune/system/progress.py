"""What is shown on stderr while a run works: its stage, the time left, and bars; and the logger of the package."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner

from permprune.system.stages import Stages, duration

log = logging.getLogger("permprune")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging
console = Console(stderr=True)
T = TypeVar("T")

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
_shown = True


def enable_progress_bars() -> None:
    """Show progress on stderr if it is a terminal: the stage of a run, and bars; this is the default."""
    global _shown
    _shown = True


def disable_progress_bars() -> None:
    """Show no progress; the logger "permprune" is not affected."""
    global _shown
    _shown = False


def quiet_libraries() -> None:
    """Turn off the logs and progress bars of other libraries."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def track(items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]:
    """Yield `items` and show a progress bar with `label`, if stderr is a terminal."""
    with _displayed() as display, display.bar(label, total) as task:
        yield from display.bars.track(items, total=total, task_id=task)


@contextmanager
def bar(label: str, total: int, completed: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A context with a progress bar for `total` steps; yields a function of (completed, label) that updates it."""
    with _displayed() as display, display.bar(label, total, completed) as task:
        yield lambda done, text: display.bars.update(task, completed=done, description=text)


@contextmanager
def stages(*names: str) -> Iterator[Stages]:
    """A context, or a decorator, of a run with these stages, of which the first begins; `stage` begins the others.

    Without names, what it yields is to be planned. Inside another run its stages are not shown.
    """
    made = Stages(names)
    with _displayed() as display:
        if display.stages is not None:
            yield made
            return
        display.stages = made
        if names:
            stage(names[0])
        try:
            yield made
        finally:
            display.stages = None


def stage(name: str) -> None:
    """Begin the next stage of this name, if the run has one: it is shown on a terminal, and logged."""
    if _display is None or _display.stages is None or not _display.stages.enter(name):
        return
    stages = _display.stages
    left = stages.left()
    time_left = f", about {duration(left)} left" if left and left >= 1 else ""
    log.info("stage %d of %d: %s%s", stages.current + 1, len(stages.names), name, time_left)
    _display.show()


@contextmanager
def working(text: str) -> Iterator[None]:
    """A context of a command: `text` is shown, if stderr is a terminal, until stages or bars are.

    What the command prints to stdout hides everything until a stage or a bar begins.
    """
    with _displayed() as display:
        display.text = text
        display.show()
        with redirect_stdout(cast(TextIO, _Hiding(sys.stdout, display))) if display.shown else nullcontext():
            yield


class _Display:
    """What is shown at present: a line with the stage or the text of a command, above the bars."""

    def __init__(self) -> None:
        self.shown = _shown and (console.is_terminal or console.is_jupyter)  # elsewhere rich prints empty lines
        self.bars = Progress(*_COLUMNS, TimeRemainingColumn(), console=console, auto_refresh=False)
        self.stages: Stages | None = None
        self.text = ""
        self._began, self._line = time.monotonic(), Spinner("line")
        self._live: Live | None = None

    def show(self) -> None:
        """Show everything as it is now, also after `hide`."""
        if not self.shown:
            return
        if self._live is None:
            self._live = Live(get_renderable=self._render, console=console, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.refresh()

    @contextmanager
    def bar(self, label: str, total: int | None, completed: int = 0) -> Iterator[TaskID]:
        """A context with another bar."""
        task = self.bars.add_task(label, total=total, completed=completed)
        self.show()
        try:
            yield task
        finally:
            if self._live is not None:
                self._live.refresh()
            self.bars.remove_task(task)

    def hide(self) -> None:
        """Erase everything from the terminal."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _render(self) -> Group:
        line = []
        if text := self._text():
            self._line.update(text=text)
            line = [self._line]
        return Group(*line, *([self.bars] if self.bars.tasks else []))

    def _text(self) -> str:
        if self.stages is None or self.stages.current < 0:
            return self.text and f"{self.text}; {duration(time.monotonic() - self._began)} so far"
        task, stages = next(iter(self.bars.tasks), None), self.stages
        left = stages.left(task.completed / task.total if task and task.total else None)
        number, names = stages.current, stages.names
        text = f"stage {number + 1} of {len(names)}: {names[number]}; {duration(stages.elapsed)} so far"
        return f"{text}, about {duration(left)} left" if left and left >= 1 else text


class _Hiding:
    """A stream that hides a display before anything is written to it."""

    def __init__(self, stream: TextIO, display: _Display) -> None:
        self._stream, self._display = stream, display

    def write(self, text: str) -> int:
        self._display.hide()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_display: _Display | None = None


@contextmanager
def _displayed() -> Iterator[_Display]:
    """A context with the display of an outer context, or with a new one."""
    global _display
    if _display is not None:
        yield _display
        return
    _display = made = _Display()
    try:
        yield made
    finally:
        made.hide()
        _display = None
