import json
from pathlib import Path

import pytest

from permprune.data.benchmarks import SOURCES, splits, wikitext2
from permprune.errors import PermpruneError

from ..task_files import ROWS, WIKITEXT, write_task_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task_files(tmp_path)


@pytest.mark.parametrize("task", SOURCES)
def test_rows_are_those_of_the_files(task: str, folder: Path) -> None:
    found = splits(task, str(folder), version=1.0, config_source="somewhere")
    assert found["evaluation"].to_list() == ROWS[task]
    assert len(found["training"]) == 0


def test_training_rows_are_read_where_prompts_show_some(folder: Path) -> None:
    found = splits("rte", str(folder), few_shot=1)
    assert [row["label"] for row in found["training"]] == [0, 1]
    with pytest.raises(PermpruneError, match=r"there is no .*CB/train\.jsonl"):
        splits("cb", str(folder), few_shot=1)


@pytest.mark.parametrize("task", SOURCES)
def test_missing_file_is_named(task: str, folder: Path) -> None:
    source = SOURCES[task]
    path = folder / source.files[-1].format(source.part)
    path.unlink()
    with pytest.raises(PermpruneError, match=f"there is no {path}"):
        splits(task, str(folder))


DAMAGED = {
    "arc_easy": json.dumps([{"instruction": "Answer: a", "answer": "answer1"}]),
    "arc_challenge": "no json",
    "boolq": '{"passage": "a", "label": true}',
    "hellaswag": "a b.\n4\na\nb\nc\nd",
    "piqa": "0",
    "rte": "sentence1\tsentence2\tlabel\na\tb\tmaybe",
    "cb": '{"premise": "a", "hypothesis": "b", "label": "perhaps"}',
    "wic": '{"sentence1": "a", "sentence2": "b", "start1": 0, "label": true}',
}


@pytest.mark.parametrize("task", SOURCES)
def test_damaged_file_is_named(task: str, folder: Path) -> None:
    source = SOURCES[task]
    path = folder / source.files[-1].format(source.part)
    path.write_text(DAMAGED[task])
    with pytest.raises(PermpruneError, match=path.name):
        splits(task, str(folder))


def test_wikitext_is_joined_by_blank_lines(folder: Path) -> None:
    text = wikitext2(folder)
    assert text.startswith("\n\n = Text = \n\n\n\n\n the order")
    assert text.endswith(" . \n\n\n")
    assert text.split() == WIKITEXT.split()
