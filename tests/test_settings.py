"""Settings by keywords."""

import subprocess
import sys

import pytest

import permprune
from permprune import PermpruneError, Settings
from permprune.options import nearest
from permprune.permuters.registry import permuter

from .cli.running import run


def test_a_misspelt_setting_names_the_nearest() -> None:
    assert Settings.of(pattern="4:8", seed=3) == Settings(pattern="4:8", seed=3)
    with pytest.raises(PermpruneError, match=r'there is no setting "patern": did you mean "pattern"\?'):
        Settings.of(patern="2:4")
    with pytest.raises(PermpruneError, match='there is no setting "colour": choose one of pattern, saliency'):
        Settings.of(colour=1)


def test_a_misspelt_method_names_the_nearest() -> None:
    with pytest.raises(PermpruneError, match=r'unknown permuter "newtn": did you mean "newton"\?'):
        permuter("newtn:rounds=3")
    assert nearest("x", ["one", "two"]) == "choose one of one, two"


def test_the_version_stands_in_one_place() -> None:
    code, stdout, _ = run("--version")
    assert (code, stdout.strip()) == (0, permprune.__version__)


def test_the_library_prints_nothing_unasked() -> None:
    code = "import permprune.system.progress as p; p.log.error('said'); print(type(p.log.handlers[0]).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("NullHandler\n", "")
