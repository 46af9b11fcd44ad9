"""The page and the pictures: what they say, that they are whole, and that nothing in a record can break out of them."""

import copy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permprune.report import pictures
from permprune.report.run import decision, render, write_report
from permprune.report.style import save
from permprune.report.words import duration, number, percent, with_error

from .pages import Page, assert_svg

pytestmark = pytest.mark.usefixtures("with_pictures")

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = [
    {
        "name": f"model.layers.{index}.{kind}",
        "pattern": "2:4",
        "kept_none": 0.78,
        "kept": 0.79 + 0.001 * index,
        "error_none": 0.05,
        "error": 0.04,
    }
    for index in range(4)
    for kind in KINDS
]
MIXED = [{**layer, "pattern": "3:4" if place == 2 else "2:4"} for place, layer in enumerate(LAYERS)]
OPTIONS = "start=ria:rounds=0:compensate=true:train_steps=158:examples=16"

CURVE = [
    {"round": 0, "loss": 3.9, "kept": True, "seconds": 1.0},
    {"round": 1, "loss": 3.5, "kept": True, "seconds": 2.0},
    {"round": 2, "loss": 40.0, "kept": False, "seconds": 3.0},
    {"round": 3, "loss": float("nan"), "kept": False, "seconds": 4.0},
]
RECORD: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "model": "someone/small-model",
    "note": None,
    "settings": {
        "pattern": "2:4",
        "saliency": "wanda",
        "order": "newton",
        "mode": "fold",
        "update": "none",
        "seed": 0,
        "exclude": [],
    },
    "versions": {"torch": "2.13.0"},
    "measured": {
        "metric": "perplexity",
        "data": "WikiText-2 test",
        "count": 6144,
        "unit": "tokens",
        "dense": 30.1,
        "none": 175.7,
        "pruned": 63.4,
    },
    "gap_closed": 0.58,
    "seconds": {"calibrate": 31.2, "search": 493.0, "total": 7300.0},
    "layers": LAYERS,
    "curve": CURVE,
    "permutations": {"model.layers.0.mlp.down_proj.input": [[1, 0, 2, 3]]},
    "gathers": [{"site": "model.norm.output", "output": "model.norm", "inputs": [], "order": [3, 2, 1, 0]}],
}
BARE: dict[str, Any] = {
    "measured": None, "gap_closed": None, "layers": [], "curve": [], "permutations": {}, "gathers": [],
}  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECORD), **fields}


def permuted_by(method: str, **fields: Any) -> dict[str, Any]:
    return changed(settings={**RECORD["settings"], "order": method}, **fields)


@pytest.fixture(scope="module")
def rendered() -> str:
    """The page of `RECORD`, whose pictures take half a second to draw."""
    return render(RECORD)


def test_the_page_states_the_decision_and_shows_three_pictures(rendered: str) -> None:
    page = Page(rendered)
    assert (
        "2:4 with newton: perplexity 63.40 against 30.10 dense and 175.7 without permutation: 58 % of the gap closed."
        in page.text
    )
    assert len(page.images) == 3
    for picture in page.images:
        assert_svg(picture)
    assert page.outside == [], "the page needs nothing beside itself"
    assert all(part in page.text for part in ("wanda", "2.13.0", "2.0 h", "8 min"))
    assert "script" not in page.tags


def test_the_page_shows_what_training_after_pruning_brought() -> None:
    curve = [{"epoch": n, "loss": None, "value": value, "seconds": 9.0} for n, value in enumerate([0.8, 0.85, 0.84])]
    optimised = {
        "train": "norms", "examples": 1200, "metric": "top-1 accuracy", "before": 0.8, "after": 0.85, "stderr": 0.01,
        "count": 872, "unit": "examples", "curve": curve,
    }  # fmt: skip
    page = Page(render(changed(optimised={**optimised, "dense": None})))
    assert "Trained after that: top-1 accuracy 0.850 ± 0.010 against 0.8000 before." in page.text
    teacher_outputs = Page(render(changed(optimised={**optimised, "dense": 0.9})))
    keeps = "Trained after that it keeps 94 % of the dense top-1 accuracy (0.850 ± 0.010 of 0.9000; 0.8000 before)."
    assert keeps in teacher_outputs.text
    assert "All other figures on this page were measured before training" in page.text


def test_a_mix_is_described_with_the_loss_of_each_attempt() -> None:
    layers = {layer["name"]: layer["pattern"] for layer in MIXED} | {"model.layers.9.mlp.up_proj": "dense"}
    points = [{"keep": keep, "bytes": 10**6, "expected": 9 - keep, "measured": 9.1 - keep} for keep in (0.4, 0.6, 1.0)]
    attempts = [{"keep": 0.6, "chosen": 31.0, "confirmed": 32.0}]
    mix = {"layers": layers, "keep": 0.6, "bytes": 10**6, "rounds": [8.5], "curve": points, "attempts": attempts}
    page = Page(render(changed(layers=MIXED, settings={**RECORD["settings"], "pattern": "mixed"}, mix=mix)))
    assert "1 layer 3:4" in page.text and "32.00 on data for the result" in page.text
    assert "A mix of patterns with newton: perplexity" in page.text


def test_the_page_follows_the_reader_s_light_and_width(rendered: str) -> None:
    assert "prefers-color-scheme: dark" in rendered and 'name="viewport"' in rendered
    for picture in Page(rendered).images:
        root = ElementTree.fromstring(picture)
        width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
        whole = f"M 0 {height:g} L {width:g} {height:g}"
        assert whole not in picture.decode(), "no ground of its own, which would glare on a dark page"


def test_a_record_without_perplexities_says_so() -> None:
    page = Page(render(changed(measured=None, gap_closed=None)))
    assert "The network was not measured." in page.text
    assert "output error of a layer 4.00 % against 5.00 % without permutation" in page.text
    assert len(page.images) == 2


def test_a_bare_record_still_gives_a_page() -> None:
    page = Page(render(changed(**BARE)))
    assert page.images == []
    assert "2:4 with newton: the network was not measured." in page.text


def test_an_update_is_named() -> None:
    settings = {**RECORD["settings"], "update": "sparsegpt"}
    assert decision(changed(settings=settings)).startswith("2:4 with newton, then sparsegpt: perplexity 63.40 against")


ACCURACY = {**RECORD["measured"], "metric": "top-1 accuracy", "dense": 0.8, "none": 0.6, "pruned": 0.72}
MEASURED = "2:4 with newton: perplexity 63.40 against 30.10 dense and 175.7 without permutation"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (changed(gap_closed=-0.124), f"{MEASURED}: the gap is 12 % wider."),
        (changed(gap_closed=None), f"{MEASURED}."),
        (
            changed(measured=ACCURACY),
            "2:4 with newton keeps 90 % of the dense top-1 accuracy (0.7200 of 0.8000; 0.6000 without permutation): "
            "58 % of the gap closed.",
        ),
        (
            permuted_by("none", measured=ACCURACY),
            "2:4 in natural order keeps 90 % of the dense top-1 accuracy (0.7200 of 0.8000).",
        ),
        (permuted_by("none"), "2:4 in natural order: perplexity 63.40 against 30.10 dense."),
        (
            permuted_by("none", measured=None),
            "2:4 in natural order: mean output error of a layer 5.00 %; the network was not measured.",
        ),
    ],
)
def test_the_decision_fits_the_outcome(record: dict[str, Any], sentence: str) -> None:
    assert decision(record) == sentence


def test_the_note_is_printed() -> None:
    note = "No network: a small text was used."
    assert note in Page(render(changed(**BARE, note=note))).text


def test_everything_in_a_record_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>$\\bad$"
    record = changed(model=evil, note=evil, versions={evil: evil}, permutations={evil: [[1, 0]]})
    record["settings"] = {**RECORD["settings"], "order": evil, "calibration": evil, "exclude": [evil]}
    record["measured"]["data"] = evil
    record["layers"][0]["name"] = f"model.layers.0.{evil}"
    page = Page(render(record))
    assert "script" not in page.tags
    assert page.outside == []
    assert page.text.count(evil) >= 7


@pytest.mark.parametrize(
    ("values", "metric", "method"),
    [
        ((30.1, 175.7, float("inf")), "perplexity", f"newton:{OPTIONS}"),
        ((0.9, 0.5, 0.7), "top-1 accuracy", "a_method with $ signs $"),
    ],
)
def test_bars_are_drawn_for_any_values(values: tuple[float, float, float], metric: str, method: str) -> None:
    assert_svg(save(pictures.bars(*values, metric, method)))


def test_the_same_record_gives_the_same_page(rendered: str) -> None:
    assert render(copy.deepcopy(RECORD)) == rendered


def test_kinds_are_told_apart_and_experts_averaged() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "h.0.experts.0.w1", "h.0.experts.1.w1", "head"]
    layers = [{"name": name, "a": float(place), "b": 1.0} for place, name in enumerate(names)]
    assert pictures.layer_kinds(layers, "a", "b") == {
        "attn.c_proj": [(0, 0.0, 1.0)],
        "mlp.c_proj": [(0, 1.0, 1.0), (1, 2.0, 1.0)],
        "w1": [(0, 3.5, 1.0)],
        "head": [(0, 5.0, 1.0)],
    }


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8))
def test_no_two_kinds_share_a_label(paths: set[tuple[str, ...]]) -> None:
    layers = [{"name": ".".join(path), "a": 0.0, "b": 0.0} for path in paths]
    assert len(pictures.layer_kinds(layers, "a", "b")) == len(paths)


def test_files_are_written_whole(rendered: str, tmp_path: Path) -> None:
    write_report(RECORD, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == rendered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_numbers_read_well() -> None:
    assert [with_error(*pair) for pair in ((44.77, 0.8953), (9800.0, 196.2), (0.7, None), (float("inf"), 1.0))] == [
        "44.77 ± 0.90",
        "9,800 ± 196",
        "0.7000",
        "not finite",
    ]
    close = [with_error(*pair) for pair in ((0.67712, 0.02388), (51.9, 1.5), (0.5, 0.0), (2.5e6, 3.0e5))]
    assert close == ["0.677 ± 0.024", "51.9 ± 1.5", "0.5000 ± 0.0000", "2.5e+06 ± 3e+05"]
    assert [number(value) for value in (30.089, 175.66, 12400.2, 2.5e7, 0.01234, None, float("inf"))] == [
        "30.09",
        "175.7",
        "12,400",
        "2.5e+07",
        "0.0123",
        "\N{EN DASH}",
        "not finite",
    ]
    assert [percent(value) for value in (0.584, -0.001, -0.124, None)] == [
        "58 %",
        "0 %",
        "\N{MINUS SIGN}12 %",
        "\N{EN DASH}",
    ]
    assert [duration(value) for value in (0.21, 31.2, 493.0, 9000.0, None)] == [
        "0.2 s",
        "31 s",
        "8 min",
        "2.5 h",
        "\N{EN DASH}",
    ]
