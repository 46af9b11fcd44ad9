"""What is shown on stderr while a run works: its stage, the time left, and bars; and the logger of the package."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console, Group

from permprune.system.imports import on_first_use

with on_first_use(globals()):
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

log = logging.getLogger("permprune")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging
console = Console(stderr=True)
T = TypeVar("T")

READ, CALIBRATE, UPDATE = "read the model", "calibrate", "update the weights"
TRAIN, TRAIN_BLOCKS = "train", "train the blocks"
MEASURE, DENSE, NATURAL = "measure", "measure the dense model", "measure the natural order"
CHECK, WRITE, PACK, SPEED = "check", "write", "pack", "measure the speed"
ALLOCATE = "choose the patterns"
"""The stages of many runs, in the words that are shown."""

PRIOR = 0.1
"""The share of the expected time of a run after which its own pace counts as much as the expectation."""

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
        text, times = TextColumn("{task.description}"), (TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(text, BarColumn(), MofNCompleteColumn(), *times, console=console, auto_refresh=False)
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


class Stages:
    """The stages of a run by name, in their order, with the seconds that each is expected to take, as far as known.

    The next stage begins with `enter`; some may be left out.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.current = -1
        self._limited: Collection[str] = ()
        self._spent: dict[int, float] = {}
        self._began = 0.0
        self.plan(names)

    def plan(self, names: Sequence[str]) -> None:
        """Set the stages of a run that has not begun."""
        self.names = [*names]
        self._expected: list[float | None] = [None] * len(names)

    def expect(self, seconds: Mapping[str, float | None], limited: Collection[str] = ()) -> None:
        """Set the expected seconds of stages by name; those in `limited` end by the clock."""
        self._expected, self._limited = [seconds.get(name) for name in self.names], limited

    def enter(self, name: str) -> bool:
        """Begin the next stage of this name; returns False, and goes on with the current one, if none follows."""
        if name not in self.names[self.current + 1 :]:
            return False
        if self.current >= 0:
            self._spent[self.current] = self.elapsed
        self.current, self._began = self.names.index(name, self.current + 1), time.monotonic()
        return True

    @property
    def elapsed(self) -> float:
        """The seconds since the current stage began."""
        return time.monotonic() - self._began

    def left(self, done: float | None = None) -> float | None:
        """Return the seconds that the run still takes, with the share of the stage that is done, if that is known.

        None if a stage that is not over has no expected time. Times are scaled by the pace of the run so far.
        """
        ahead = [seconds for seconds in self._expected[self.current :] if seconds is not None]
        if len(ahead) < len(self.names) - self.current:
            return None
        known = {number: seconds for number, seconds in enumerate(self._expected) if seconds is not None}
        prior = PRIOR * sum(known.values())
        over = {number: seconds for number, seconds in self._spent.items() if number in known}
        pace = (sum(over.values()) + prior) / max(sum(known[number] for number in over) + prior, 1e-9)
        scaled = [
            known[number] * (1 if self.names[number] in self._limited else pace)
            for number in range(self.current, len(self.names))
        ]
        return _left(scaled[0], self.elapsed, done, limited=self.names[self.current] in self._limited) + sum(scaled[1:])


def _left(expected: float, elapsed: float, done: float | None, *, limited: bool) -> float:
    """The seconds that are left of a stage: the more of it is done, the more its own pace counts."""
    share = elapsed / max(expected, 1e-9) if limited or done is None else 0.0
    share = min(1.0, max(share, done or 0.0))
    if limited or done is None:
        return (1 - share) * expected
    return (1 - share) * (elapsed + (1 - share) * expected)


def duration(seconds: float) -> str:
    """Format a duration: in seconds up to two minutes, then in minutes, then in hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
