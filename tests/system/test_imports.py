"""Classes whose modules are imported by a call."""

import subprocess
import sys

import pytest

from permprune.system.imports import called_later

PROGRAM = """
import sys
from permprune.system.imports import called_later
with called_later("fractions", "Fraction"):
    from fractions import Fraction
assert "fractions" not in sys.modules
def half() -> Fraction | int: return Fraction(1, denominator=2)
assert str(half()) == "1/2"
from fractions import Fraction
assert isinstance(half(), Fraction)
"""


def test_a_class_is_imported_when_it_is_called() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_a_module_that_is_imported_already_stays() -> None:
    import fractions

    with called_later("fractions", "Fraction"):
        from fractions import Fraction

        assert Fraction is fractions.Fraction


def test_after_an_error_the_module_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ZeroDivisionError), called_later("colorsys", "Rainbow"):
        raise ZeroDivisionError
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


HELP = """
import sys
from permprune.cli import app
try:
    app()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], ["prune"]])
def test_help_does_not_load_what_it_does_not_show(command: list[str]) -> None:
    arguments = [sys.executable, "-c", HELP, *command, "--help"]
    run = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8")
    loaded = set(run.stderr.split())
    assert "typer.rich_utils" in loaded and "Usage" in run.stdout
    assert not loaded & {"markdown_it", "pygments", "torch", "transformers"}
