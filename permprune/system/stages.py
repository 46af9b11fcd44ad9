"""The stages of a run: which one it is in, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

READ, CALIBRATE, TRAIN, UPDATE = "read the model", "calibrate", "train", "update the weights"
MEASURE, DENSE, NATURAL = "measure", "measure the dense model", "measure the natural order"
CHECK, WRITE, PACK, SPEED = "check", "write", "pack", "measure the speed"
ALLOCATE = "choose the patterns"
"""The stages of many runs, in the words that are shown."""

PRIOR = 0.1
"""The share of the expected time of a run after which its own pace counts as much as the expectation."""


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
