import errno
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors import SafetensorError

from permprune.errors import PermpruneError
from permprune.zoo.packages import cache_root, cached


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _fill(folder: Path) -> None:
    (folder / "file").write_text("first")


def test_builds_once(root):
    assert cached("a/b", _fill) == root / "a/b"
    assert cached("a/b", lambda _folder: pytest.fail("built twice")) == root / "a/b"


def test_default_root_is_the_users(monkeypatch):
    monkeypatch.setenv("PERMPRUNE_CACHE", "")
    assert cache_root().name == "permprune"


def test_failed_build_leaves_nothing(root):
    def fail(folder: Path) -> None:
        _fill(folder)
        raise PermpruneError("no network")

    with pytest.raises(PermpruneError, match="no network"):
        cached("entry", fail)
    assert list(root.iterdir()) == []


def test_first_to_finish_wins(root):
    def slower(folder: Path) -> None:
        cached("entry", _fill)
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


def test_two_processes_at_once(root):
    context = get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_run, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in root.iterdir()] == ["entry"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_full_disk(error):
    def fail(_folder: Path) -> None:
        raise error

    with pytest.raises(PermpruneError, match=r"No space left on device.*make room"):
        cached("entry", fail)


def test_root_is_a_file(root):
    root.write_text("")
    with pytest.raises(PermpruneError, match="PERMPRUNE_CACHE"):
        cached("entry", _fill)


def test_other_errors_pass():
    def fail(_folder: Path) -> None:
        raise OSError("not about the disk")

    with pytest.raises(OSError, match="not about the disk"):
        cached("entry", fail)
