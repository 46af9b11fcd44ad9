"""What runs show: on the terminal, in the record, the report and the card."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from permprune.checkpoints.io import load
from permprune.checkpoints.record import SIDES, Record, Showcase, read_record
from permprune.evaluation.size import weight_bytes
from permprune.jobs.packing import pack_folder, unpack_folder
from permprune.report.run import measured_rows, render
from permprune.report.showcase import SIGNS, answers, examples_shown, plain
from permprune.report.words import DASH

from ..cli.running import run
from ..records import record_of

SMALL = ["--samples", "4", "--windows", "6", "--length", "24", "--order", "ria"]


@pytest.fixture
def options(tiny_checkpoint: Path, tiny_text: Path) -> list[Any]:
    return [tiny_checkpoint, "--calibration", tiny_text, "--data", tiny_text, *SMALL]


def steps(stdout: str) -> list[str]:
    return stdout.split("Next:\n")[1].strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--mode", "fold"], ["--mode", "gather"], ["--pack", "bf16"]], ids=str)
def test_prune_shows_models_side_by_side(shown: None, options: list[Any], extra: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("prune", *options, *extra, "--set", "examples=2", "--out", out)
    assert code == 0, stderr
    record = read_record(out)
    made = record.showcase
    assert made and len(made.examples) == 2 and made.unit == "tokens/s" and [*made.sides] == [*SIDES]
    assert made.sides["dense"].speed and made.sides["pruned"].speed and made.sides["none"].speed is None
    for text in (made.examples[0].given, "plain 2:4", "tokens/s", "gap closed"):
        assert text in " ".join(stdout.split())
        assert text in " ".join((out / "report.html").read_text().split())
        assert text in " ".join((out / "README.md").read_text().split())
    commands, code = steps(stdout)[:2], "\n".join(steps(stdout)[2:])
    assert all(run(*command.split("#")[0].split()[1:])[0] == 0 for command in commands[:1])
    found: dict[str, Any] = {}
    exec(code, found)
    assert isinstance(found["model"], LlamaForCausalLM)
    if "--pack" in extra:
        assert made.sides["pruned"].bytes == made.sides["pruned"].packed < made.sides["none"].bytes
        unpack_folder(out, tmp_path / "unpacked")
        again = read_record(tmp_path / "unpacked").showcase
        assert again and again.sides["pruned"].bytes == weight_bytes(load(tmp_path / "unpacked"))
        assert again.sides["pruned"].speed is again.sides["pruned"].dtype is None
    else:
        assert pack_folder(out, tmp_path / "packed", dtype="bf16").weights.packed == made.sides["pruned"].packed
        again = read_record(tmp_path / "packed").showcase
        assert again and again.sides["pruned"].bytes == made.sides["pruned"].packed
        assert again.sides["pruned"].speed is None and again.examples == made.examples


def test_no_examples(shown: None, options: list[Any], tmp_path: Path) -> None:
    code, stdout, _ = run("prune", *options, "--set", "examples=0", "--out", tmp_path / "out")
    made = read_record(tmp_path / "out").showcase
    assert code == 0 and made and not made.examples and made.note in stdout


def test_a_speed_that_cannot_be_measured_costs_nothing_else(
    shown: None, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no clock")

    monkeypatch.setattr("permprune.jobs.speeds.measure_speed", broken)
    assert run("prune", *options, "--out", tmp_path / "out")[0] == 0
    made = read_record(tmp_path / "out").showcase
    assert made and made.examples and not made.unit and "no clock" in caplog.text


def example(kind: str, expected: str | None, *given: str) -> tuple[dict[str, Any], dict[str, Any]]:
    one = {"given": "x", "answers": dict(zip(SIDES, given, strict=True)), "expected": expected, "picture": None}
    return {"kind": kind, "note": "how", "examples": [one], "sides": {}, "unit": "", "threads": 1, "device": ""}, one


def test_what_is_right_wrong_and_missing() -> None:
    def marks(*arguments: Any) -> list[str]:
        return [" ".join(f"{text}/{mark}" for text, mark in pieces) for pieces in answers(*example(*arguments))]

    assert marks("classes", "a", "a", "b", "a") == ["a/right", "b/wrong", "a/right"]
    assert marks("classes", None, "a", "b", "a") == ["a/", "b/wrong", "a/right"]
    assert marks("texts", None, "a", "b", "a") == ["a/", "b/", "a/"]
    spoken = marks("transcripts", "one two three", "one two three", "one too three", "two three four")
    assert spoken == ["one two three/", "one/ two/missing too/wrong three/", "one/missing two three/ four/wrong"]
    pieces = answers(*example("transcripts", "one two", "", "one", "one three"))
    assert [plain(one) for one in pieces] == [
        SIGNS["missing"].format("one two"), f"one {SIGNS['missing'].format('two')}",
        f"one {SIGNS['missing'].format('two')} {SIGNS['wrong'].format('three')}",
    ]  # fmt: skip


def test_records_keep_what_is_shown() -> None:
    values = record_of().to_json()
    assert values.pop("showcase") is None and Record.of(values).showcase is None  # of an earlier release
    shown, _ = example("classes", "a", "a", "b", "a")
    sides = {"dense": {"bytes": 4_000_000, "packed": 2_000_000, "speed": 10.0, "dtype": "fp32"}}
    record = record_of(showcase={**shown, "sides": sides, "unit": "images/s"})
    assert isinstance(record.showcase, Showcase) and Record.of(record.to_json()) == record
    assert ("MB", "4.00", DASH, DASH) in measured_rows(record.to_json())
    assert ("images/s", "10.00", DASH, DASH) in measured_rows(record.to_json())
    assert examples_shown(shown, ["dense", "plain", "permprune"]).renderables
    shown["examples"][0] |= {"picture": "QUJD", "pictures": {"none": "REVG"}}
    page = render(record_of(showcase={**shown, "sides": sides}).to_json())
    assert page.count("base64,QUJD") == page.count("base64,REVG") == 1
