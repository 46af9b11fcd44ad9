"""Wheels of the registry, and the cache of what is made of them."""

import errno
import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors import SafetensorError

from permprune.errors import PermpruneError
from permprune.zoo import packages
from permprune.zoo.packages import Package, cache_root, cached, fetch

METADATA = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel in a folder that stands for the registry."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(shelf), "DISABLE_PIP_VERSION_CHECK": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    file = shelf / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("thing/data/words.txt", "words")
        archive.writestr("thing/more.txt", "more")
        archive.writestr("thing/__init__.py", "raise SystemExit('never run this')")
        archive.writestr("thing-1.0.dist-info/METADATA", METADATA)
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    return Package("thing", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 1, "MIT")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_takes_the_members_of_a_wheel_alone(wheel: Package, folder: Path) -> None:
    files = fetch(wheel, ["thing/more.txt", "thing/data/words.txt"], folder)
    assert files == [folder / "more.txt", folder / "words.txt"]
    assert [file.read_text() for file in files] == ["more", "words"]
    assert sorted(folder.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("change", "member", "message"),
    [
        (lambda wheel: replace(wheel, sha256="0" * 64), "thing/more.txt", r"not the expected file.*check the package"),
        (
            lambda wheel: replace(wheel, version="2.0"),
            "thing/more.txt",
            r"cannot fetch thing==2\.0 .*check the network",
        ),
        (lambda wheel: wheel, "thing/other", "holds no thing/other"),
    ],
)
def test_what_is_not_there_is_one_line(
    change: Callable[[Package], Package], member: str, message: str, wheel: Package, folder: Path
) -> None:
    with pytest.raises(PermpruneError, match=message) as caught:
        fetch(change(wheel), [member], folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution\nERROR: more\n", r"\(No matching distribution\)"),
        ("python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_pip_fails(stderr: str, reason: str, monkeypatch: pytest.MonkeyPatch, wheel: Package, folder: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_args, **_options: failed)
    with pytest.raises(PermpruneError, match=f"cannot fetch thing==1.0 .*{reason}.*check the network") as caught:
        fetch(wheel, ["thing/more.txt"], folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> None:
    (folder / "file").write_text("first")


def test_an_entry_is_built_once(root: Path) -> None:
    assert cached("a/b", fill) == root / "a/b"
    assert cached("a/b", lambda _folder: pytest.fail("built twice")) == root / "a/b"


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMPRUNE_CACHE", "")
    assert cache_root().name == "permprune"


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermpruneError("no network"), PermpruneError, "no network"),
        (OSError(errno.ENOSPC, FULL), PermpruneError, f"{FULL}.*make room"),
        (SafetensorError(f"{FULL} (os error 28)"), PermpruneError, f"{FULL}.*make room"),
        (OSError("not about the disk"), OSError, "not about the disk"),
    ],
)
def test_a_build_that_fails_leaves_nothing(error: Exception, kind: type[Exception], message: str, root: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(kind, match=message):
        cached("entry", fail)
    assert list(root.iterdir()) == []


def test_a_cache_that_is_a_file(root: Path) -> None:
    root.write_text("")
    with pytest.raises(PermpruneError, match="PERMPRUNE_CACHE"):
        cached("entry", fill)


def test_the_first_to_finish_provides_the_entry(root: Path) -> None:
    def slower(folder: Path) -> None:
        cached("entry", fill)
        (folder / "file").write_text("second")

    assert (cached("entry", slower) / "file").read_text() == "first"
    assert [path.name for path in root.iterdir()] == ["entry"]


def _meet(folder: Path) -> None:
    _BARRIER.wait(timeout=60)
    (folder / "file").write_text("whole")


def _run(barrier) -> None:
    global _BARRIER
    _BARRIER = barrier
    assert (cached("entry", _meet) / "file").read_text() == "whole"


def test_two_processes_at_once(root: Path) -> None:
    context = get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_run, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in root.iterdir()] == ["entry"]
