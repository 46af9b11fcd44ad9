"""The tables of docs/results/ and README.md are those of the committed rows."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
BENCHMARKS = ROOT / "benchmarks"
TABLES = runpy.run_path(str(FIGURES / "tables.py"))
PAGES = TABLES["pages"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == TABLES["written"](text), "run python docs/figures/tables.py"
    if page.parent == ROOT / "docs" / "results":  # all tables of results are those of rows
        assert text.count("\n|---") == len(re.findall("<!-- table: ", text)), "a table without rows"


def test_every_table_is_on_one_page_and_every_file_of_rows_is_shown() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", text)) == sorted([*TABLES["LISTS"], *TABLES["TABLES"]])
    rows = {path.name for path in (ROOT / "docs" / "results").rglob("*.json*")}
    assert rows == set(re.findall(r"\((?:[\w./-]+/)?([\w-]+\.jsonl?)\)", text))


def test_the_check_fails_where_a_figure_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = runpy.run_path(str(FIGURES / "tables.py"))
    page = tmp_path / "docs" / "results" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text("<!-- table: engines -->\n| 1 |\n<!-- end table -->\n", encoding="utf-8")
    monkeypatch.setitem(tables["main"].__globals__, "pages", lambda: [page])
    monkeypatch.setitem(tables["main"].__globals__, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="differ from their rows"):
        tables["main"]()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables["main"]()
    assert "| llama.cpp Q4_0, dense | " in page.read_text(encoding="utf-8")


def test_dense_smollm2_has_one_perplexity_on_each_text() -> None:
    dense = [row for row in TABLES["rows"]("protocol.jsonl") if row["method"] == "dense"]
    values = {text: {round(row["texts"][text]["value"], 2) for row in dense} for text in TABLES["TEXTS"]}
    assert values == {"wikitext2": {20.39}, "held back": {30.55}}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_be_imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(script))


def test_rows_of_a_benchmark_replace_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    add, path = runpy.run_path(str(BENCHMARKS / "rows.py"))["add"], tmp_path / "rows.jsonl"
    for milliseconds in (3.0, 2.0):
        for batch in (1, 16):
            add(path, {"table": "layers", "batch": batch}, {"packed": milliseconds})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and all('"packed": 2.0' in line and '"version": ' in line for line in lines)


def test_a_benchmark_of_models_becomes_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"batch": 1, "context": 128, "first_token": 0.5, "next_token": 0.1, "prefill": 256.0, "decode": 10.0}
    sizes = {"tiny (fp32)": 400, "tiny (bf16)": 200, "out/packed-bf16": 130}
    rows = [{"name": name, "dense": "(" in name, "bytes": size, "resident": 1000, "speeds": [speed]}
            for name, size in sizes.items()]  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps({"threads": 2, "device": "CPU", "rows": rows}), encoding="utf-8")
    path = tmp_path / "speed.jsonl"
    monkeypatch.setattr(sys, "argv", ["rows.py", str(tmp_path / "bench.json"), "--model", "Tiny", "--rows", str(path)])
    runpy.run_path(str(BENCHMARKS / "rows.py"), run_name="__main__")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["weights"], row["size"]) for row in found] == [
        ("dense fp32", 2.0), ("dense bf16", 1.0), ("packed bf16", 0.65),
    ]  # fmt: skip
    assert all(row["table"] == "models" and row["decode"] == 10.0 and row["version"] for row in found)


def test_a_benchmark_of_types_compares_models_of_one_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {
        "tiny (fp32)": 10.0,
        "tiny (bf16)": 20.0,
        "packed-int8": 14.0,
        "packed-int8 (bf16)": 18.0,
        "packed-bf16": 25.0,
    }
    rows = [{"name": name, "dense": name.startswith("tiny"), "bytes": 1, "resident": 1,
             "speeds": [{"batch": 8, "context": 64, "seconds": 1.0, "items": items}]}
            for name, items in speeds.items()]  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps({"threads": 1, "rows": rows}), encoding="utf-8")
    path = tmp_path / "speed.jsonl"
    arguments = [str(tmp_path / "bench.json"), "--types", "--model", "Tiny", "--rows", str(path)]
    monkeypatch.setattr(sys, "argv", ["rows.py", *arguments])
    runpy.run_path(str(BENCHMARKS / "rows.py"), run_name="__main__")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["type"], row["dense"], row["packed"], row["times"]) for row in found] == [
        ("fp32", 10.0, 14.0, 1.4), ("bf16", 20.0, 25.0, 1.25),
    ]  # fmt: skip
    assert {row["measured"] for row in found} == {"items, 8 of 64 tokens"}
