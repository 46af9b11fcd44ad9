"""Damaged files in the folder of a pruned model: one line that names the file, or the model as it was."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.probe import OUTPUTS, PROBE
from permprune.checkpoints.record import FORMAT, RECORD, Record, read_record
from permprune.checkpoints.weights import GATHERED
from permprune.report.run import render

from ..cli.running import fails, run
from .pruned import commands, write_pruned, write_source

pytestmark = pytest.mark.slow

MODES = ["fold", "gather"]

fuzzed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder of each mode; shared, so leave them as they are."""
    source = write_source(tmp_path_factory.mktemp("models") / "dense", tiny_tokenizer)
    for mode in MODES:
        write_pruned(source, source.with_name(mode), mode)
    return {mode: source.with_name(mode) for mode in MODES}


@pytest.fixture(params=MODES)
def folder(request: pytest.FixtureRequest, pruned: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(pruned[request.param], tmp_path / request.param))


@pytest.fixture
def gathered(pruned: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned["gather"], tmp_path / "gathered"))


def refused(folder: Path, name: str) -> None:
    """Every command that reads the folder refuses it in a line that names the file."""
    out = folder.with_name("out")
    for arguments in commands(folder, out).values():
        assert name in fails(*arguments) and not list(folder.parent.glob("out*"))


# permprune.json


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """What sets one value of a record."""

    def change(record: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        item: Any = record
        for key in parents:
            item = item[int(key) if key.isdecimal() else key]
        item[int(last) if last.isdecimal() else last] = value

    return change


RECORDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a layer that is none": put("layers/0/name", "model.layers.9.mlp.up_proj"),
    "a layer that is no linear one": put("layers/0/name", "model.norm"),
    "a layer whose name has two lines": put("layers/0/name", "a\nb"),
    "a layer transposed": put("layers/0/transposed", True),
    "a layer twice": lambda record: record["layers"].append(record["layers"][0]),
    "no pattern": put("layers/0/pattern", "2"),
    "a pattern of nothing": put("layers/0/pattern", "0:4"),
    "a pattern of 5000 digits": put("layers/0/pattern", f"1:{'9' * 5000}"),
    "a pattern that does not divide": put("layers/0/pattern", "2:5"),
    "a name that is a number": put("layers/0/name", 3),
    "layers that are a text": put("layers", "all"),
    "no settings": put("settings", None),
    "a setting that is a folder of settings": put("settings/memory", {"a": {"b": 1}}),
    "a permuter that is a number": put("settings/order", 1),
    "half a character": put("model", "\ud800"),
    "an infinite number of seconds below 0": put("seconds", {"search": -1.0}),
    "a share that is a text": put("layers/0/kept", "0.5"),
    "a number beyond all": put("layers/0/error", 10**400),
    "too large a number": put("measured", {"data": "", "metric": "", "dense": 1e305, "none": 1, "pruned": 1, "count": 1,
                                           "unit": ""}),
    "a perplexity of 0": put("measured", {"data": "", "metric": "perplexity", "dense": 0, "none": 1, "pruned": 1,
                                          "count": 1, "unit": ""}),
    "something measured": put("measured", []),
    "a sample of nothing": put("sample/natural/score", []),
    "a sample that is crooked": put("sample/natural/score/0", [1]),
    "a table without blocks": put("permutations", {"space": []}),
    "a table of unequal blocks": put("permutations", {"space": [[0], [0, 1]]}),
    "format 0": put("format", 0),
    "format true": put("format", True),
    "format null": put("format", None),
    "a curve of numbers": put("curve", [1, 2]),
    "gathers that are no list": put("gathers", {"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_that_says_nonsense_is_refused(folder: Path, damage: str) -> None:
    record = json.loads((folder / RECORD).read_text())
    RECORDS[damage](record)
    (folder / RECORD).write_text(json.dumps(record))
    refused(folder, RECORD)


@pytest.mark.parametrize("key", json.loads(json.dumps(list(Record.__dataclass_fields__)))[:10])
def test_a_record_without_a_key_is_refused(gathered: Path, key: str) -> None:
    record = json.loads((gathered / RECORD).read_text())
    del record[key]
    (gathered / RECORD).write_text(json.dumps(record))
    refused(gathered, f"{RECORD} is damaged (it lacks {key})")


TEXTS = {
    "empty": b"",
    "not JSON": b"permprune",
    "half": b'{"format": 1, "layers": [',
    "a list": b"[]",
    "null": b"null",
    "nested": b"[" * 100_000,
    "nested in a key": b'{"format": 1, "layers": ' + b'{"a":' * 100_000,
    "not UTF-8": b'{"format": "\xff"}',
    "zeros": b"\0" * 100,
    "5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_record_that_is_no_json_object_is_refused(gathered: Path, text: str) -> None:
    (gathered / RECORD).write_bytes(TEXTS[text])
    refused(gathered, RECORD)


def test_a_record_that_is_missing_or_a_folder_is_refused(gathered: Path) -> None:
    (gathered / RECORD).unlink()
    refused(gathered, RECORD)
    (gathered / RECORD).mkdir()
    refused(gathered, RECORD)


def test_a_later_format_says_what_wrote_it(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({"format": FORMAT + 1, "version": "9.9", "layers": record["layers"]}))
    refused(folder, f"{RECORD} is of format {FORMAT + 1}, from permprune '9.9': upgrade permprune")


def test_keys_that_are_unknown_are_kept(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "later": {"a": [1, None]}}))
    permprune.save(permprune.load(folder), folder.with_name("out"))
    assert json.loads((folder.with_name("out") / RECORD).read_text()) == {**record, "later": {"a": [1, None]}}


def test_a_record_of_before_loads(folder: Path) -> None:
    """Folders of early versions have neither a sample nor an update, and another name for the order."""
    record = json.loads((folder / RECORD).read_text())
    for key in ("sample", "optimised", "measured"):
        del record[key]
    del record["settings"]["update"]
    record["settings"]["permute"] = order = record["settings"].pop("order")
    (folder / RECORD).write_text(json.dumps(record))
    assert run("verify", folder)[0] == 0
    assert "was not measured" in render(read_record(folder).to_json())
    assert read_record(folder).settings["order"] == order


# gathered.safetensors


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8),
    "a header that is too long": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "a header that is no JSON": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F32,', 1)),
    "a type that is none": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"G32"', 1)),
    "another model": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "a tensor less": lambda path: edited(path, lambda tensors: tensors.pop(UP)),
    "a tensor more": lambda path: edited(path, lambda tensors: tensors.update({UP[:-6] + "more": torch.zeros(1)})),
    "a tensor of another shape": lambda path: edited(path, lambda tensors: tensors.update({UP: torch.zeros(3, 3)})),
}  # fmt: skip


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights_that_are_damaged_are_refused(gathered: Path, damage: str) -> None:
    WEIGHTS[damage](gathered / GATHERED)
    refused(gathered, GATHERED)


def test_gathered_weights_without_gathers_are_refused(gathered: Path) -> None:
    record = json.loads((gathered / RECORD).read_text())
    (gathered / RECORD).write_text(json.dumps({**record, "gathers": []}))
    refused(gathered, "lacks gathers in its permprune.json, which its gathered.safetensors needs")


# probe.safetensors


PROBES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "no outputs": lambda path: edited(path, lambda tensors: tensors.pop(OUTPUTS)),
    "no inputs": lambda path: edited(path, lambda tensors: tensors.pop("input_ids")),
    "outputs of no size": lambda path: edited(path, lambda tensors: tensors.update({OUTPUTS: torch.zeros(0)})),
    "outputs in another type": lambda path: edited(
        path, lambda tensors: tensors.update({OUTPUTS: tensors[OUTPUTS].bfloat16()})
    ),
}  # fmt: skip

RUNS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "inputs of another name": lambda path: edited(
        path, lambda tensors: tensors.update(words=tensors.pop("input_ids"))
    ),
    "inputs that are not read": lambda path: edited(path, lambda tensors: tensors.update(more=torch.zeros(1))),
    "inputs of another type": lambda path: edited(
        path, lambda tensors: tensors.update(input_ids=tensors["input_ids"].float())
    ),
    "inputs out of range": lambda path: edited(
        path, lambda tensors: tensors.update(input_ids=tensors["input_ids"] + 10**6)
    ),
    "inputs of another shape": lambda path: edited(
        path, lambda tensors: tensors.update(input_ids=tensors["input_ids"][0])
    ),
    "a cache that is a tensor": lambda path: edited(
        path, lambda tensors: tensors.update(past_key_values=torch.ones(2))
    ),
    "outputs of another shape": lambda path: edited(
        path, lambda tensors: tensors.update({OUTPUTS: tensors[OUTPUTS][:, :1]})
    ),
    "other outputs": lambda path: edited(path, lambda tensors: tensors.update({OUTPUTS: tensors[OUTPUTS] + 1})),
    "outputs that are no numbers": lambda path: edited(
        path, lambda tensors: tensors.update({OUTPUTS: tensors[OUTPUTS] * math.nan})
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", PROBES)
def test_a_probe_that_is_damaged_is_refused(folder: Path, damage: str) -> None:
    PROBES[damage](folder / PROBE)
    refused(folder, PROBE)


@pytest.mark.parametrize("damage", RUNS)
def test_a_probe_that_does_not_fit_is_refused_by_those_who_need_it(folder: Path, damage: str) -> None:
    RUNS[damage](folder / PROBE)
    lines = commands(folder, folder.with_name("out"))
    for name in ("verify", "finetune"):
        assert PROBE in fails(*lines[name]) or "other outputs" in fails(*lines[name])
    assert run(*lines["evaluate"])[0] == 0


# Fuzzing


def reads(folder: Path) -> bool:
    """Whether a folder loads, verifies and has a report; else that it is refused in one line."""
    try:
        permprune.verify(folder)
    except permprune.PermpruneError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and str(error).isprintable(), str(error)
        return False
    return True


@pytest.fixture(scope="module")
def fuzz(pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to damage one file of, and then to mend it."""
    place = tmp_path_factory.mktemp("fuzz")
    return {mode: Path(shutil.copytree(folder, place / mode)) for mode, folder in pruned.items()}


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([10**30, -(10**30), 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, "", "\ud800", "2:4",
                     "9" * 50, [], {}, [[]], [0], [1], [0, 1], [[0]], {"": 0}]),
    st.recursive(st.none(), lambda inner: st.lists(inner, min_size=1, max_size=1), max_leaves=30),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a parsed JSON; of long lists to the first few."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with up to three of the values inside it replaced, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))[1:]
        *parents, last = draw(st.sampled_from(found)) if found else (None,)
        owner = value
        for key in parents:
            owner = owner[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "double", "exchange"])) if found else None:
            case "replace":
                owner[last] = draw(VALUES)
            case "remove":
                del owner[last]
            case "double" if isinstance(owner, list):
                owner.insert(last, owner[last])
            case "exchange":
                other = draw(st.sampled_from(list(owner) if isinstance(owner, dict) else range(len(owner))))
                owner[last], owner[other] = owner[other], owner[last]
    return value


@pytest.mark.parametrize("mode", MODES)
@fuzzed
@given(data=st.data())
def test_any_change_of_a_record_is_refused_or_harmless(fuzz: dict[str, Path], mode: str, data: st.DataObject) -> None:
    path = fuzz[mode] / RECORD
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps(data.draw(changed(json.loads(whole)))))
        if reads(fuzz[mode]):
            record = read_record(fuzz[mode])
            assert Record.of(json.loads(json.dumps(record.to_json()))).gathers == record.gathers
    finally:
        path.write_bytes(whole)


@settings(max_examples=15)
@given(data=st.data())
def test_a_record_that_is_read_has_a_report(full_record: dict[str, Any], data: st.DataObject) -> None:
    values = data.draw(changed(full_record))
    try:
        record = Record.of(values)
    except ValueError:
        return
    render(record.to_json())


@st.composite
def garbled(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with bytes replaced, cut out or put in; near its beginning, where a header is, or anywhere."""
    place = draw(st.integers(0, min(len(content), 4096)) | st.integers(0, len(content)))
    new = draw(st.binary(max_size=8))
    kept = draw(st.sampled_from([place, place + len(new), place + 1, place + 100, len(content)]))
    return content[:place] + new + content[kept:]


@pytest.mark.parametrize(("mode", "name"), [("fold", PROBE), ("gather", PROBE), ("gather", GATHERED), ("fold", RECORD)])
@fuzzed
@given(data=st.data())
def test_any_change_of_bytes_is_refused_or_harmless(
    fuzz: dict[str, Path], mode: str, name: str, data: st.DataObject
) -> None:
    path = fuzz[mode] / name
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(garbled(whole)))
        reads(fuzz[mode])
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def full_record(pruned: dict[str, Path]) -> dict[str, Any]:
    """A record in which nothing is absent."""
    record: dict[str, Any] = json.loads((pruned["gather"] / RECORD).read_text())
    figures = {"metric": "perplexity", "count": 10, "unit": "tokens"}
    curve = [{"epoch": epoch, "loss": None, "value": 9.0 - epoch, "seconds": 1.0} for epoch in range(3)]
    return {
        **record,
        "layers": record["layers"][:3],
        "curve": [{"round": number, "loss": 3.0, "kept": True, "seconds": 1.0} for number in range(3)],
        "measured": {**figures, "data": "text.txt", "dense": 3.0, "none": 9.0, "pruned": 7.0},
        "gap_closed": 0.4,
        "optimised": {**figures, "train": "all", "examples": 4, "before": 9.0, "after": 7.0, "stderr": 0.1,
                      "dense": 3.0, "curve": curve},
    }  # fmt: skip
