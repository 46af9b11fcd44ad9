"""Running the command line as a person does."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from typer.main import get_command

from permprune.cli import app

COMMAND = get_command(app)
"""The command line, built once; `typer.testing.CliRunner` builds it in every call."""


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    stdout, stderr = StringIO(), StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        COMMAND.main([str(argument) for argument in arguments], prog_name="permprune")
    return int(ended.value.code or 0), stdout.getvalue(), stderr.getvalue()


def fails(*arguments: str | Path) -> str:
    """The one line of an error, after checking that it is one and that the status says so."""
    code, _, stderr = run(*arguments)
    assert code == 2
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("permprune: "), stderr
    return lines[0]
