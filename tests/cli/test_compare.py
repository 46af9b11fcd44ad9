"""`permprune compare`, run as a person runs it."""

import json
from pathlib import Path
from typing import Any

import pytest

from .running import fails, run

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    small = ["--length", "16", "--samples", "24", "--windows", "4"]
    return [str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text), *small]


def figures(out: Path) -> list[tuple[Any, ...]]:
    rows = json.loads((out / "figures.json").read_text())["rows"]
    return [(row["pattern"], row["method"], row["minutes"], row["perplexity"]) for row in rows]


def test_a_comparison_prints_a_table_and_the_decision(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--patterns", "2:4,mixed", "--methods", "ria,newton:rounds=2", "--budgets", "0.0001,9"]
    code, stdout, stderr = run("compare", *source, *options, "--mode", "gather", "--out", out)
    assert code == 0, stderr
    assert "the least loss of 8 cells" in " ".join(stdout.split()) and "0.0001" in stdout
    assert "Size against perplexity" in (out / "report.html").read_text()
    assert "exists already" in fails("compare", *source, "--out", out)


@pytest.mark.parametrize("fixture", ["tiny_vit"])
def test_a_comparison_of_images(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for kind in ("cat", "dog", "Owl"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(30):
            pixels = generator.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / kind / f"{number}.png")
    data = ["--calibration", tmp_path / "pictures", "--data", tmp_path / "pictures", "--samples", "6", "--windows", "1"]
    options = ["--patterns", "1:4,2:4", "--methods", "ria", "--out", tmp_path / "out"]
    code, stdout, stderr = run("compare", request.getfixturevalue(fixture), *data, *options)
    assert code == 0 and "of the dense top-1 accuracy" in " ".join(stdout.split()), stderr


def test_bad_input_is_one_line(source: list[str], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert '--budgets is "short": give numbers' in fails("compare", *source, *out, "--budgets", "short")
    assert "which 5 does not divide" in fails("compare", *source, *out, "--patterns", "2:4,2:5")
    code, _, stderr = run("compare", *source, *out, "--pattern", "2:4")
    assert code == 2 and "no option --pattern" in stderr
