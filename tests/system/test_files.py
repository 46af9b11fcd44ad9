"""Files and folders that are whole or absent, and the work folder of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from permprune.errors import PermpruneError
from permprune.system.files import (
    PREFIX,
    WorkFolder,
    atomic_folder,
    require_absent,
    require_space,
    require_writable,
    write_json,
    write_whole,
)


def full(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"value": 1})
    with pytest.raises(PermpruneError, match=r"cannot write .*figures.json: No space left on device; free space"):
        write_whole(path, full)
    assert path.read_text() == '{\n  "value": 1\n}\n'
    assert names(tmp_path) == ["figures.json"]


def test_a_link_is_replaced_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "figures.json"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_json(link, 1)
    assert victim.read_text() == "mine" and not link.is_symlink()
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(PermpruneError, match="is not a file"):
            write_json(path, 1)
    assert Path(os.devnull).is_char_device()


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_json(tmp_path / "figures.json", 1)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "other").mkdir()
    assert (tmp_path / "figures.json").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out" / "other").stat().st_mode


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = rf"cannot write {out}: No space left on device; try again"
    with pytest.raises(PermpruneError, match=message), atomic_folder(out, advice="try again") as folder:
        write_json(folder / "first.json", 1)
        write_whole(folder / "second.json", full)
    assert names(tmp_path) == []
    with atomic_folder(out) as folder:
        write_json(folder / "first.json", 1)
        assert not out.exists()
    assert names(out) == ["first.json"] and names(tmp_path) == ["out"]
    with pytest.raises(PermpruneError, match="exists already"), atomic_folder(out):
        pass


def test_a_work_folder_stays_with_its_state_and_goes_when_the_work_is_done(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), work.held("prune", resume=False):
        (work.scratch / "weights").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), work.held("prune", resume=True):
        (work.path / "state").touch()
        raise ZeroDivisionError
    assert work.holds_state() and not work.scratch.exists()
    with pytest.raises(PermpruneError, match="continue with --resume, or remove it"), work.held("prune", resume=False):
        pass
    with (
        pytest.raises(PermpruneError, match="belongs to an interrupted permprune prune"),
        work.held("compare", resume=True),
    ):
        pass
    with work.held("prune", resume=True):
        assert (work.path / "state").exists() and names(work.scratch) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize(("saved", "more"), [(True, "states/more"), (False, "first")])
def test_a_work_folder_is_held_by_one_run_until_its_process_ends(tmp_path: Path, saved: bool, more: str) -> None:
    """Of one that is killed while it saves, the states that are whole are left."""
    work = WorkFolder(tmp_path / "out")
    with work.held("prune", resume=False):
        with pytest.raises(PermpruneError, match="another run is writing"), WorkFolder(work.out).held("prune", True):
            pass
        assert work.scratch.exists()
    code = f"""
import os, pathlib
from permprune.system.files import WorkFolder, write_whole
with WorkFolder(pathlib.Path({str(work.out)!r})).held("prune", False) as work:
    {saved} and (work.path / "state").touch()
    write_whole(work.path / {more!r}, lambda temporary: os.kill(os.getpid(), 9))
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    with work.held("prune", resume=saved):
        assert (work.path / "state").exists() == saved
        assert not [*work.path.rglob(f"{PREFIX}*")]


def test_a_run_that_was_killed_while_it_marked_its_folder_is_not_in_the_way(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    (work.path / f"{PREFIX}new").mkdir(parents=True)
    with work.held("prune", resume=False):
        assert not work.holds_state()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    work, thesis = WorkFolder(tmp_path / "out"), tmp_path / "documents" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("words")
    if kind == "folder":
        thesis.parent.rename(work.path)
        thesis = work.path / thesis.name
    elif kind == "file":
        work.path.write_text("words")
    else:
        work.path.symlink_to(thesis.parent)
    for resume in (False, True):
        with pytest.raises(PermpruneError, match=r"out\.partial .*choose another --out"), work.held("prune", resume):
            pass
    assert thesis.read_text() == "words" and names(thesis.parent) == ["thesis.tex"]


def test_where_nothing_can_be_written_is_said_before(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file / "below", Path("/proc/figures.json"), tmp_path / ("long" * 64)):
        with pytest.raises(PermpruneError, match=rf"cannot write {path}: "):
            require_writable(path)
    require_writable(tmp_path / "new" / "folder" / "figures.json")
    assert names(tmp_path) == ["file"]
    for out in (Path(), Path(".."), Path("/"), file):
        with pytest.raises(PermpruneError, match="exists already"):
            require_absent(out)
    with pytest.raises(PermpruneError, match="there is no folder"):
        require_absent(tmp_path / "no" / "out")


def test_too_little_space_is_said_before(tmp_path: Path) -> None:
    require_space(tmp_path / "out", 1)
    with pytest.raises(PermpruneError, match=r"takes about 931,322,575 GiB, and .* GiB are free there"):
        require_space(tmp_path / "out", 1e18)


def test_a_state_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")

    def write(temporary: Path) -> None:
        temporary.touch()
        assert not work.holds_state()

    with work.held("prune", resume=False):
        write_whole(work.path / "order.state", write)
        assert work.holds_state()
