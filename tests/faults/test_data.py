"""Data that are damaged or hostile: one line that names the place."""

import json
import shutil
from pathlib import Path

import pytest

from permprune.zoo import texts

from ..cli.running import fails, run

DEEP = "[" * 100_000 + "]" * 100_000
GOOD = '{"text": "the order of the channels", "label": "yes"}\n'
LINES = {
    "JSON nested too deep": '{"text": "a", "more": ' + DEEP + "}",
    "half of a surrogate pair": r'{"text": "half a \ud83d pair", "label": "no"}',
    "not JSON": '{"text": "the order',
    "not a JSON object": '["text"]',
}


@pytest.mark.parametrize("message", LINES)
@pytest.mark.parametrize("option", ["--calibration", "--data"])
def test_a_line_of_text(message: str, option: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    other = {"--calibration": "--data", "--data": "--calibration"}[option]
    (tmp_path / "bad.jsonl").write_text(GOOD + LINES[message] + "\n")
    data = [option, tmp_path / "bad.jsonl", other, tiny_text, "--order", "ria", "--samples", "24", "--windows", "4"]
    assert f"bad.jsonl, line 2: {message}" in fails(
        "prune", tiny_checkpoint, *data, "--length", "16", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("message", LINES)
def test_a_row_of_a_table(message: str, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + LINES[message] + "\n")
    assert f"bad.jsonl, line 2: {message}" in fails("evaluate", tiny_bert, "--data", tmp_path / "bad.jsonl")


@pytest.mark.parametrize("message", LINES)
@pytest.mark.parametrize("place", [1, 2])
def test_a_row_of_answers(message: str, place: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = ['{"prompt": "which weights", "answer": "two"}\n']
    rows.insert(place - 1, LINES[message] + "\n")
    (tmp_path / "bad.jsonl").write_text("".join(rows))
    line = fails("evaluate", tiny_checkpoint, "--data", tmp_path / "bad.jsonl", "--length", "16")
    assert f"bad.jsonl, line {place}: {message}" in line


def test_whole_pairs_of_surrogates_are_characters(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the \U0001f600 order of the channels " * 20}) for _ in range(20)]
    (tmp_path / "good.jsonl").write_text("\n".join(rows))
    assert r"\ud83d" in rows[0]
    data = ["--data", tmp_path / "good.jsonl", "--length", "16", "--windows", "4"]
    assert run("evaluate", tiny_checkpoint, *data)[0] == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with what fetching would have left."""
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / texts.ENTRY).mkdir(parents=True)
    return tmp_path / "cache"


@pytest.mark.parametrize("command", ["evaluate", "compare", "prune"])
def test_a_text_that_the_cache_has_lost(command: str, cache: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It is not looked for on a hub under the name "None"."""
    out = ["--out", tmp_path / "out"] if command == "prune" else []
    line = fails(command, tiny_checkpoint, *out)
    assert "jsonl is missing" in line and f"remove {cache / texts.ENTRY}, and it will be downloaded again" in line


def test_a_cache_that_was_removed_is_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(cache / texts.ENTRY)

    def build(folder: Path) -> None:
        (folder / "evaluation.jsonl").write_text(GOOD)

    monkeypatch.setattr(texts, "_build", build)
    assert texts.text_file("evaluation").read_text() == GOOD
