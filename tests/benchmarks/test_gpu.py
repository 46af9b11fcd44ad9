"""The benchmark of a GPU, as far as it goes on a CPU: small shapes, and a page of all stages."""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.slow
def test_a_stage_that_fails_is_on_the_page(gpu: dict[str, Any], tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, device="cpu", size="small", model=str(tmp_path / "absent"))
    assert not gpu["succeeded"]("demo", options)
    (row,) = map(json.loads, (tmp_path / "gpu.json").read_text(encoding="utf-8").splitlines())
    assert (row["stage"], row["error"]) == ("demo", "failed")
    assert "absent" in (tmp_path / "demo.log").read_text(encoding="utf-8")
    gpu["write_page"](tmp_path)
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "## demo" in page and "failed" in page
