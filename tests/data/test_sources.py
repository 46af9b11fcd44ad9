"""Tables, folders and data sets, and the part of them that is drawn."""

from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permprune.data.items import Selection
from permprune.data.sources import dataset, locate, parse_name, read_rows, read_table
from permprune.errors import PermpruneError

from .tables import SUFFIXES, write_table


@given(
    keys=st.lists(st.text(max_size=3), min_size=1, max_size=60),
    seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    counts=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_parts_of_one_source_never_overlap(keys: list[str], seeds: tuple[int, int], counts: tuple[int, int]) -> None:
    found: list[set[str]] = []
    for part, seed, count in zip(("calibration", "evaluation"), seeds, counts, strict=True):
        try:
            chosen = Selection(part, count, seed, shared=True).indices(keys)  # type: ignore[arg-type]
        except PermpruneError:
            chosen = []
        assert len(set(chosen)) == len(chosen) <= count
        found.append({keys[at] for at in chosen})
    assert not found[0] & found[1]


def test_parts_of_one_source_are_all_of_it() -> None:
    keys = [f"name {n}" for n in range(200)]
    calibration, evaluation = (
        Selection(part, 200, 0, shared=True).indices(keys) for part in ("calibration", "evaluation")
    )
    assert sorted(calibration + evaluation) == list(range(200))
    assert min(len(calibration), len(evaluation)) > 70


def test_a_draw_depends_on_the_seed_alone() -> None:
    keys = [f"name {n}" for n in range(50)]
    drawn = Selection("calibration", 10, 0, shared=False).indices(keys)
    assert drawn == Selection("evaluation", 10, 0, shared=False).indices(keys)
    assert drawn == Selection("calibration", 30, 0, shared=False).indices(keys)[:10]
    assert drawn != Selection("calibration", 10, 1, shared=False).indices(keys)
    assert sorted(Selection("calibration", 99, 0, shared=False).indices(keys)) == list(range(50))


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(PermpruneError, match="0 of 1 available examples for calibration"):
        Selection("calibration", 0, 0, shared=False).indices(["a"])
    with pytest.raises(PermpruneError, match="of 0 available examples"):
        Selection("calibration", 3, 0, shared=False).indices([])


def stream(rows: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"row": list(range(rows))}).to_iterable_dataset()


def test_rows_of_a_data_set_are_drawn_likewise() -> None:
    def drawn(part: str, count: int, seed: int, shared: bool) -> list[int]:
        found = Selection(part, count, seed, shared).rows(stream(60))  # type: ignore[arg-type]
        assert all(name == f"row {row['row']}" for name, row in found)
        return [row["row"] for _, row in found]

    calibration, evaluation = (drawn(part, 60, 0, True) for part in ("calibration", "evaluation"))
    assert sorted(calibration + evaluation) == list(range(60)) and calibration and evaluation
    assert drawn("calibration", 60, 0, False) != drawn("calibration", 60, 1, False)
    assert drawn("calibration", 5, 0, False) == drawn("evaluation", 5, 0, False)
    assert drawn("calibration", 5, 0, False) != list(range(5))
    with pytest.raises(PermpruneError, match="no rows for evaluation"):
        Selection("evaluation", 5).rows(stream(1).filter(lambda _: False))


def test_default_splits_share_no_rows() -> None:
    both, one = (Selection("calibration", 1, shared=shared) for shared in (True, False))
    assert [each.of_data_set(name).shared for each in (both, one) for name in ("name@test", "name")] == [1, 0, 0, 0]
    assert parse_name("a/b:c", "calibration") == ("a/b", "c", "train")
    assert parse_name("a/b:c", "evaluation") == ("a/b", "c", "test")
    assert parse_name("a/b@validation", "evaluation") == ("a/b", None, "validation")


def test_a_data_set_keeps_its_media_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "audio": datasets.Audio(), "text": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict({key: [None] for key in features}, features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    with dataset("name", "calibration") as found:
        assert not found.features["image"].decode and not found.features["audio"].decode


def test_what_is_neither_here_nor_an_id_is_refused(tmp_path: Path) -> None:
    assert locate(tmp_path, "images") == tmp_path
    assert locate("owner/name:config@split", "images") is None
    assert locate(f"{tmp_path}@train", "images") is None
    for source in ("./none", "./none@train", "a/b/c", "rows.tsv", tmp_path / "none"):
        with pytest.raises(PermpruneError, match="no images at"):
            locate(source, "images")


@pytest.mark.parametrize("name", [*(f"a{suffix}" for suffix in SUFFIXES), "a [1]*.csv", "A.JSON"])
def test_tables_of_every_kind_say_the_same(tmp_path: Path, name: str) -> None:
    rows = [{"text": 'a "quoted" one', "label": "x"}, {"text": "two\u2028lines", "label": ""}]
    assert read_table(write_table(tmp_path / name, rows)) == rows


@pytest.mark.parametrize(
    ("name", "text"), [("a.tsv", "\ufefftext\ta\nx\t\n"), ("a.jsonl", '\ufeff{"text": "x", "a": ""}\n\n')]
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_table(tmp_path / name) == [{"text": "x", "a": ""}]


def test_numbers_of_a_table_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,score\nnull,1,2.5\nNA,0,1\n")
    assert read_table(tmp_path / "a.csv") == [
        {"text": "null", "label": 1, "score": 2.5},
        {"text": "NA", "label": 0, "score": 1.0},
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "does not load as a table: No columns"),
        ("a.csv", 'text,label\n"one', "does not load as a table: .*EOF inside string"),
        ("a.parquet", "PAR1", "does not load as a table: Parquet file size"),
        ("a.jsonl", '{"text": 1}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", "{", r"line 1: not JSON \(Expecting property name"),
        ("a.json", '{"text": "one"}', "is not a list of JSON objects"),
        ("a.json", "[", "not JSON"),
        ("a.xml", "<a/>", r"not a table: give a \.csv, \.tsv, \.parquet, \.jsonl or \.json file"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PermpruneError, match=rf"{name}.* {message}") as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("a.tsv", "text\tlabel\n"), ("a.jsonl", "\n"), ("a.json", "[]")])
def test_a_table_without_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PermpruneError, match=f"{name} has no rows"):
        read_rows(tmp_path / name, "calibration")
