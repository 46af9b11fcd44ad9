"""Tasks on the command line."""

import json
from pathlib import Path

import pytest

from permprune.report.words import with_error

from ..task_files import ROWS, write_task_files
from .running import fails, run


def test_evaluate_tasks(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # outside a repository
    files, figures = write_task_files(tmp_path / "files"), tmp_path / "figures.json"
    tasks = "piqa, cb, wikitext2"
    code, stdout, stderr = run("evaluate", tiny_checkpoint, "--tasks", tasks, "--data", files, "--json", figures)
    assert code == 0 and not stderr.strip()
    assert not capfd.readouterr().err.strip(), "programs that lm-eval calls are silent as well"
    found = json.loads(figures.read_text())
    assert (found["names"], found["limit"], found["few_shot"]) == (["piqa", "cb", "wikitext2"], None, None)
    rows = {(row["task"], row["metric"]): row for row in found["results"]}
    assert list(rows) == [
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("cb", "acc"),
        ("cb", "f1"),
        ("wikitext2", "perplexity"),
        ("average", "acc"),
    ]
    assert rows["piqa", "acc"]["examples"] == len(ROWS["piqa"])
    assert rows["average", "acc"]["tasks"] == 2
    lines = [line.split() for line in stdout.splitlines() if "│" in line]
    assert [line[1] for line in lines] == [task for task, _ in rows]
    for line, row in zip(lines, rows.values(), strict=True):
        assert ("±" in line) is (row["stderr"] is not None)


@pytest.mark.slow
def test_compare_and_sweep_score_each_method(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    files, figures = write_task_files(tmp_path / "files"), tmp_path / "figures.json"
    texts = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "4"]
    tasks = ["--tasks", "piqa,cb", "--task-data", files, "--methods", "ria"]
    code, stdout, _ = run("compare", tiny_checkpoint, *texts, *tasks, "--json", figures)
    assert code == 0 and "task score" in stdout
    dense, none, ria = json.loads(figures.read_text())["rows"]
    code, _, _ = run("evaluate", tiny_checkpoint, *tasks[:2], "--data", files, "--json", figures)
    alone = json.loads(figures.read_text())["results"]
    assert dense["tasks"] == alone[:-1]
    assert (dense["score"], dense["score_stderr"]) == (alone[-1]["value"], alone[-1]["stderr"])
    assert code == 0 and with_error(ria["score"], ria["score_stderr"]) in stdout
    out = tmp_path / "sweep"
    code, stdout, _ = run("sweep", tiny_checkpoint, *texts, *tasks, "--patterns", "2:4", "--out", out)
    assert code == 0 and "task score" in stdout
    swept = json.loads((out / "figures.json").read_text())
    assert swept["dense"]["tasks"] == dense["tasks"]
    assert [row["tasks"] for row in swept["rows"]] == [none["tasks"], ria["tasks"]]


def test_what_is_missing_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = write_task_files(tmp_path / "files")
    (files / "superglue/CB/val.jsonl").unlink()
    assert "there is no" in fails("evaluate", tiny_checkpoint, "--tasks", "piqa,cb", "--data", files)
    assert "no data at" in fails("evaluate", tiny_checkpoint, "--tasks", "piqa", "--data", tmp_path / "none")
    assert "train.jsonl" in fails("evaluate", tiny_checkpoint, "--tasks", "piqa", "--data", files, "--few-shot", "1")
