"""What permprune says when it cannot go on."""

from __future__ import annotations


class PermpruneError(Exception):
    """Bad input or a failed check: one line for a person, saying what is wrong and what to do.

    The command line prints the message and exits with 2; Python callers may catch it. Control characters in it, such as
    line breaks in a name that stands in a file, are escaped.
    """

    def __str__(self) -> str:
        characters = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in characters)
