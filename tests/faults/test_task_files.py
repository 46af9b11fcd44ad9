"""Code that stands beside a task's YAML file runs if a person asks for it, by an option that says so."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from permprune.data.benchmarks import SOURCES

from ..cli.running import fails, run
from ..task_files import write_task_files

pytestmark = pytest.mark.slow

CODE = """
from pathlib import Path
from datasets import Dataset

Path(__file__).with_name("ran").touch()

def splits(**_):
    return {"evaluation": Dataset.from_list([{"text": "the order", "right": at % 2} for at in range(4)])}
"""
TASK = """
task: own
custom_dataset: !function rows.splits
output_type: multiple_choice
test_split: evaluation
doc_to_text: text
doc_to_target: right
doc_to_choice: ["no", "yes"]
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "rows.py").write_text(CODE)
    (folder / "own.yaml").write_text(TASK)
    (folder / "own").write_text(TASK)
    yield folder / "own.yaml"
    for name in [name for name in sys.modules if name.startswith(str(folder))]:  # lm-eval keeps them by path
        del sys.modules[name]


@pytest.mark.parametrize("name", ["own.yaml", "./own.yaml", "OWN.YML", "../task/own.yaml", "/tmp/own", "a\\own", "own"])
@pytest.mark.parametrize("command", ["evaluate", "compare", "sweep"])
def test_tasks_are_names_and_run_nothing(
    command: str, name: str, task: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task.parent)
    data = "--data" if command == "evaluate" else "--task-data"
    out = ["--out", tmp_path / "out"] if command == "sweep" else []
    options = [data, write_task_files(tmp_path / "files"), *out]
    if name == "own":  # a name like any other, and a file here
        monkeypatch.setitem(SOURCES, "own", SOURCES["cb"])  # so that lm-eval lists no more tasks, which takes long
        assert "lm-eval has no such task" in fails(command, tiny_checkpoint, "--tasks", name, *options)
    else:
        assert f"give --task-file {name}, which runs" in fails(command, tiny_checkpoint, "--tasks", name, *options)
    assert not (task.parent / "ran").exists()


def test_task_files_run(task: Path, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    code, stdout, stderr = run("evaluate", tiny_checkpoint, "--task-file", task, "--json", figures)
    assert code == 0 and "own" in stdout, stderr
    assert (task.parent / "ran").exists()
    found = json.loads(figures.read_text())
    assert found["files"] == [str(task)] and found["results"][0]["examples"] == 4
    small = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "4"]
    code, _, stderr = run(
        "compare", tiny_checkpoint, *small, "--methods", "none", "--task-file", task, "--json", figures
    )
    assert code == 0, stderr
    assert json.loads(figures.read_text())["rows"][0]["tasks"] == found["results"][:1]
    local = ["--tasks", "piqa", "--data", write_task_files(tmp_path / "files"), "--limit", "1"]
    code, stdout, stderr = run("evaluate", tiny_checkpoint, *local, "--task-file", task)
    assert code == 0 and "own" in stdout and "piqa" in stdout, stderr


def test_a_group_may_name_tasks_of_lm_eval(task: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def manager(**options: object) -> object:
        asked.append(options["include_defaults"])
        raise ValueError("enough")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    group = task.with_name("group.yaml")
    group.write_text("task: [piqa]\ngroup: several\n")
    for file in (task, group):
        assert "enough" in fails("evaluate", tiny_checkpoint, "--task-file", file)
    assert asked == [False, True]


def test_task_files_that_are_none(task: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no task file" in fails("evaluate", tiny_checkpoint, "--task-file", tmp_path / "none.yaml")
    task.with_name("rows.py").write_text("raise ValueError('broken')\n")
    assert "broken" in fails("evaluate", tiny_checkpoint, "--task-file", task)
    task.write_text("{" * 2000)
    fails("evaluate", tiny_checkpoint, "--task-file", task)
    task.write_bytes(b"\xff\xfe")
    fails("evaluate", tiny_checkpoint, "--task-file", task)
    task.write_text("[1, 2]")
    fails("evaluate", tiny_checkpoint, "--task-file", task)


@pytest.mark.parametrize("command", ["evaluate", "compare", "sweep"])
def test_the_help_says_that_code_runs(command: str) -> None:
    assert "code that it names runs" in " ".join(run(command, "--help")[1].replace("│", " ").split())


@pytest.mark.parametrize(("names", "expected"), [("piqa", ["piqa", "piqa", "own", "average"]), ("own", ["own"])])
def test_a_task_file_goes_with_names(
    names: str, expected: list[str], task: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    both = ["--tasks", names, "--task-file", task, "--data", write_task_files(tmp_path / "files")]
    code, _, stderr = run("evaluate", tiny_checkpoint, *both, "--json", tmp_path / "figures.json")
    assert code == 0, stderr
    assert [row["task"] for row in json.loads((tmp_path / "figures.json").read_text())["results"]] == expected
