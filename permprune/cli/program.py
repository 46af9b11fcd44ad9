"""The program, and its lines for wrong usage."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import Any

import typer


class Program(typer.core.TyperGroup):
    """The commands; wrong usage is one line on stderr and exit status 2."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            sys.exit(super().main(*arguments, **{**options, "standalone_mode": False}) or 0)
        except USAGE as error:
            if line := _usage(error):
                print(f"permprune: {line}", file=sys.stderr)
            sys.exit(2)


USAGE: Any = typer.BadParameter.__base__
"""click's error for wrong usage, of click itself or of the copy in typer."""


def _usage(error: Any) -> str:
    """Return the line for an error of click, with the closest option that there is; empty if it is the help."""
    place = error.ctx.command_path if error.ctx else "permprune"
    wrong = getattr(error, "option_name", None)
    if wrong is None or not hasattr(error, "possibilities"):
        text = error.format_message().rstrip(".")
        if not text:  # help, which is printed
            return ""
        text = f"{text[:1].lower()}{text[1:]}".replace(". Did", ": did")
        return text if text.endswith("?") else f"{text}: see {place} --help"
    known = [name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    close = get_close_matches(wrong, known, 1)
    return f"no option {wrong}: " + (f'did you mean "{close[0]}"?' if close else f"see {place} --help")
