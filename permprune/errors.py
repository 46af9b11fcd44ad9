"""Exceptions raised by permprune."""

from __future__ import annotations

import copyreg
from typing import Any


class PermpruneError(Exception):
    """Bad input or a failed check: one line for a person, saying what is wrong and what to do.

    The command line prints the message and exits with 2; Python callers may catch it. Control characters in it, such as
    line breaks in a name that stands in a file, are escaped.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes hand errors on by what they hold: subclasses are not made of their message."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]

    def __str__(self) -> str:
        characters = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in characters)


class FinalError(PermpruneError):
    """An error that the same run would end in again: its state is not kept."""


def first_line(error: BaseException) -> str:
    """Return the message of an error in one line; the name of its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown key {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
