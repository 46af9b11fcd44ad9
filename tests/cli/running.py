"""Running the command line as a person does."""

from pathlib import Path

from typer.testing import CliRunner

from permprune.cli import app


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def fails(*arguments: str | Path) -> str:
    """The one line of an error, after checking that it is one and that the status says so."""
    code, _, stderr = run(*arguments)
    assert code == 2
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("permprune: "), stderr
    return lines[0]
