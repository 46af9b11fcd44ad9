"""The benchmark of a GPU, as far as it goes on a CPU: small shapes, and a page of all stages."""

import argparse
import json
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ..forked import forked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "gpu.py"))


@pytest.mark.parametrize(("stage", "expected"), [("products", 8), ("cache", 4), ("placement", 1)])
def test_each_stage_times_every_alternative(gpu: dict[str, Any], stage: str, expected: int) -> None:
    gpu["timed"].__globals__.update(TURNS=1, CALLS=1)
    rows = list(gpu["STAGES"][stage](argparse.Namespace(device="cpu", size="small")))
    assert len(rows) >= expected
    assert all(row["ms"] > 0 for row in rows)
    assert {row["of dense"] for row in rows if row["name"] in ("dense bf16", "PyTorch")} == {1.0}


def run_forked(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Run a script as `subprocess.run` does, in a process that has what takes longest to import."""
    _, (code, said) = forked(run_script, *command[1:])
    return subprocess.CompletedProcess(command, code, said)


def run_script(*arguments: str) -> tuple[int, str]:
    """Return the exit status of a script, and what it said."""
    said, sys.argv = StringIO(), [*arguments]
    sys.path.insert(0, str(BENCHMARKS))
    with redirect_stdout(said), redirect_stderr(said):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except BaseException:
            traceback.print_exc()
            return 1, said.getvalue()
    return 0, said.getvalue()


@pytest.mark.slow
def test_a_stage_that_fails_is_on_the_page(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu["subprocess"], "run", run_forked)
    options = argparse.Namespace(out=tmp_path, device="cpu", size="small", model=str(tmp_path / "absent"))
    assert not gpu["succeeded"]("demo", options)
    (row,) = map(json.loads, (tmp_path / "gpu.json").read_text(encoding="utf-8").splitlines())
    assert (row["stage"], row["error"]) == ("demo", "failed")
    assert "absent" in (tmp_path / "demo.log").read_text(encoding="utf-8")
    gpu["write_page"](tmp_path)
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "## demo" in page and "failed" in page
