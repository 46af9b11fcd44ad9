"""Disks that are full or read-only, and files of others in the way: nothing is lost, on either side."""

import collections
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from permprune.engine.session import Session
from permprune.errors import PermpruneError
from permprune.permuters.registry import PERMUTERS
from permprune.training.loop import Trainer

from ..cli.running import fails, run

pytestmark = pytest.mark.slow

SMALL = ["--length", "16", "--samples", "24", "--windows", "4"]


@pytest.fixture
def source(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text), *SMALL]


@pytest.fixture
def training(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [str(tiny_checkpoint), "--data", str(tiny_text), "--rows", "8", "--length", "16", "--epochs", "1"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, the system refuses to write files of more bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("name", "mode"), [("ria", "fold"), ("newton:rounds=1", "gather")])
def test_a_disk_that_is_full_when_the_model_is_written_costs_no_search(
    source: list[str], tmp_path: Path, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, method = tmp_path / "out", PERMUTERS[name.partition(":")[0]]
    command = ["prune", *source, "--out", out, "--order", name, "--mode", mode]
    with files_up_to(2**15):
        code, stdout, stderr = run(*command)
    assert code == 2 and "2:4 with" in stdout and not out.exists()
    line = stderr.splitlines()[-1]
    assert line.startswith(f"permprune: cannot write {out}: ") and "File too large" in line
    assert line.endswith("free space, then repeat with --resume") and "Traceback" not in stderr
    with monkeypatch.context() as patch:
        for found in ("order", "propose"):
            if hasattr(method, found):
                patch.setattr(method, found, lambda *_: pytest.fail("searched again"))
        assert run(*command, "--resume")[0] == 0
    assert run("verify", out)[0] == 0
    assert not list(tmp_path.glob("out.*"))


def test_a_disk_that_is_full_after_training_or_a_comparison_costs_neither(
    source: list[str], training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cells = ["--patterns", "2:4", "--methods", "random"]
    for command, work, printed, size in (
        (["finetune", *training, "--train", "norms", "--out", out], (Trainer, "_epoch"), "before training", 2**15),
        (["compare", *source, *cells, "--out", out], (Session, "attempt"), "the least loss of 2 cells", 2**12),
    ):
        with files_up_to(size):
            code, stdout, stderr = run(*command)
        assert code == 2 and printed in " ".join(stdout.split()) and not out.exists()
        assert stderr.splitlines()[-1].endswith("free space, then repeat with --resume")
        with monkeypatch.context() as patch:
            patch.setattr(*work, lambda *_: pytest.fail("worked again"))
            assert run(*command, "--resume")[0] == 0
        assert not list(tmp_path.glob("out.*"))
        shutil.rmtree(out)


def test_too_little_space_is_said_before_the_work(
    source: list[str], training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("permprune.system.files.shutil.disk_usage", lambda _: usage(2**40, 2**40 - 9999, 9999))
    monkeypatch.setattr("permprune.jobs.prune.Held", SimpleNamespace(of=lambda *_, **__: pytest.fail("calibrated")))
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("trained"))
    for command in (
        ["prune", *source],
        ["prune", *source, "--order", "ria", "--set", "offload=disk"],
        ["compare", *source],
        ["finetune", *training],
    ):
        code, _, stderr = run(*command, "--out", tmp_path / "out")
        line = stderr.splitlines()[-1]
        assert code == 2 and "GiB are free there: free space, or choose another --out" in line
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["prune", "compare", "finetune"])
@pytest.mark.parametrize("out", ["file/out", "/proc/out", "folder", "link", "dangling", "no/out", "n" * 300])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(command: str, out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    line = fails(command, "smollm2-135m", "--out", tmp_path / out)
    assert any(part in line for part in ("cannot write", "exists already", "there is no folder"))
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("path", ["file/figures", "/proc/figures", "folder", "/dev/null", "n" * 300])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((name, "--json") for name in ("compare", "evaluate", "finetune")),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    command: str, path: str, option: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    out = ["--out", tmp_path / "out"] if command == "finetune" else []
    line = fails(command, "smollm2-135m", *out, option, tmp_path / path)
    assert "cannot write" in line or "is not a file: choose another path" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_tables_are_printed_before_files_are_written(
    source: list[str], training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermpruneError("cannot write it: No space left on device; free space")

    monkeypatch.setattr("permprune.system.files.write_json", refuse)
    figures = ["--json", tmp_path / "figures.json"]
    for command, printed in (
        (["evaluate", source[0], "--data", source[4], "--length", "16", *figures], "perplexity"),
        (["compare", *source, "--methods", "random", *figures], "random"),
        (["finetune", *training, "--train", "norms", "--out", tmp_path / "out", *figures], "before training"),
    ):
        code, stdout, stderr = run(*command)
        assert code == 2 and printed in stdout, stdout + stderr
        assert stderr.splitlines()[-1] == "permprune: cannot write it: No space left on device; free space"


def test_a_file_in_the_way_of_a_report_is_said_before_the_work(tmp_path: Path) -> None:
    """The folder for an interrupted run has a name that something else may have."""
    (tmp_path / "out.partial").write_text("mine")
    for command in ("prune", "compare", "finetune"):
        said = fails(command, "smollm2-135m", "--out", tmp_path / "out")
        assert "out.partial is not a work folder of permprune" in said
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_files_of_others_are_left_alone(training: list[str], tmp_path: Path, linked: bool) -> None:
    for ending in ("partial", "state"):
        mine = tmp_path / ("elsewhere" if linked else f"out.{ending}")
        (mine / "model").mkdir(parents=True, exist_ok=True)
        for name in ("thesis.tex", "model/notes"):
            (mine / name).write_text("mine")
        if linked:
            (tmp_path / f"out.{ending}").symlink_to(mine)
        for command in ("prune", "compare", "finetune"):
            for resume in ([], ["--resume"]):
                line = fails(command, training[0], "--out", tmp_path / "out", *resume)
                assert "out.partial " in line and "choose another --out" in line
    (tmp_path / "out.partial").rename(tmp_path / "moved")
    assert run("finetune", *training, "--train", "norms", "--out", tmp_path / "out")[0] == 0
    for folder in ("moved", "out.state"):
        for name in ("thesis.tex", "model/notes"):
            assert (tmp_path / folder / name).read_text() == "mine"


def test_planted_links_are_not_followed(source: list[str], tmp_path: Path) -> None:
    victim, figures = tmp_path / "victim", tmp_path / "figures.json"
    victim.write_text("mine")
    for planted in (figures, tmp_path / f".figures.json.{os.getpid()}", tmp_path / "figures.json.tmp"):
        planted.symlink_to(victim)
    code, _, _ = run("evaluate", source[0], "--data", source[4], "--length", "16", "--json", figures)
    assert code == 0 and json.loads(figures.read_text())["metric"] == "perplexity"
    assert victim.read_text() == "mine" and not figures.is_symlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".lock").symlink_to(victim)
    assert "cannot write" in fails("prune", *source, "--out", tmp_path / "out")
    assert victim.read_text() == "mine"


def test_a_run_leaves_nothing_but_its_output(source: list[str], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert run("prune", *source, "--order", "none", "--out", out)[0] == 0
    assert run("compare", *source, "--methods", "none", "--json", figures)[0] == 0
    assert set(tmp_path.iterdir()) - before == {out, figures}
