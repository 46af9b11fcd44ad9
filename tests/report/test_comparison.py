"""The page and the picture of a comparison."""

import copy
import math
from typing import Any

import pytest

from permprune.report.comparison import (
    comparison_decision,
    comparison_table,
    pareto,
    render_comparison,
)
from permprune.report.style import save

from .pages import Page, assert_svg


def row(pattern: str, method: str, value: float, size: float, front: bool = False, **fields: Any) -> dict[str, Any]:
    cost = {"seconds": 600.0, "peak_memory_mb": 900.0, "stderr": 1.5, "gap_closed": 0.5, "minutes": None}
    layers = {"1:4": 1, "2:4": 12, "3:4": 1} if pattern == "mixed" else {pattern: 14}
    return {"pattern": pattern, "method": method, "perplexity": value, "size": size, "front": front, "layers": layers,
            "bytes": 1e8 * size, **cost, **fields}  # fmt: skip


RESULT: dict[str, Any] = {
    "model": "someone/small-model",
    "note": None,
    "settings": {"saliency": "wanda", "mode": "fold", "update": "none", "seed": 0, "exclude": []},
    "measured": {"data": "text.txt", "metric": "perplexity", "count": 6144, "unit": "tokens", "overlap": 0.0},
    "metric": "perplexity",
    "dense": {"method": "dense", "perplexity": 30.1, "size": 1.0},
    "rows": [
        row("2:4", "none", 163.9, 0.651, seconds=0.01),
        row("2:4", "newton", 60.0, 0.651, minutes=5.0),
        row("2:4", "newton", 51.9, 0.651, True, minutes=20.0),
        row("1:4", "none", math.inf, 0.43),
        row("1:4", "newton", 300.0, 0.43, True),
        row("mixed", "none", 150.0, 0.66),
    ],
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RESULT), **fields}


@pytest.fixture(scope="module")
def rendered() -> str:
    """The page of `RESULT`."""
    return render_comparison(RESULT)


def test_the_page_states_the_decision_and_every_cell(rendered: str) -> None:
    page = Page(rendered)
    assert (
        "2:4 with newton: perplexity 51.90 against 30.10 dense and 163.9 without permutation, "
        "the least loss of 6 cells, at 65 % of the dense size."
    ) in page.text
    assert len(page.images) == 1 and page.outside == [] and "script" not in page.tags
    assert_svg(page.images[0])
    for part in (
        "newton, 5\N{NO-BREAK SPACE}min",
        "newton, 20\N{NO-BREAK SPACE}min",
        "mixed, 66.0 % of the dense size: 1 layer 1:4, 12 layers 2:4",
        "not finite",
        "ceil(log2(binomial(M, N)))",
        "51.9 ± 1.5",
    ):
        assert part in page.text


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (
            changed(rows=[row("2:4", "none", 40.0, 0.65, True)]),
            "2:4 in natural order: perplexity 40.00 against 30.10 dense, the least loss of 1 cell, at 65 % of the "
            "dense size.",
        ),
        (changed(rows=[row("2:4", "none", math.inf, 0.65)]), "None of 1 cell has a finite perplexity."),
        (
            changed(
                metric="top-1 accuracy",
                dense={"top-1 accuracy": 0.8},
                rows=[
                    row("2:4", "none", 0, 0.65, **{"top-1 accuracy": 0.6}),
                    row("2:4", "ria", 0, 0.65, True, **{"top-1 accuracy": 0.72}),
                    row("1:4", "none", 0, 0.4, True, **{"top-1 accuracy": 0.3}),
                ],
            ),
            "2:4 with ria keeps 90 % of the dense top-1 accuracy (0.7200 of 0.8000; 0.6000 without permutation), "
            "the least loss of 3 cells, at 65 % of the dense size.",
        ),
    ],
)
def test_the_decision_fits_the_outcome(result: dict[str, Any], sentence: str) -> None:
    assert comparison_decision(result) == sentence


def test_nothing_in_a_comparison_breaks_out() -> None:
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>$\\bad$"
    result = changed(model=evil, note=evil)
    result["settings"]["calibration"] = result["measured"]["data"] = evil
    for own in result["rows"]:
        own["method"] = evil if own["method"] == "newton" else own["method"]
    page = Page(render_comparison(result))
    assert "script" not in page.tags and page.outside == [] and page.text.count(evil) >= 6


@pytest.mark.parametrize("result", [RESULT, changed(rows=[row("2:4", "none", math.inf, 0.65)])])
def test_the_picture_is_whole(result: dict[str, Any]) -> None:
    assert_svg(save(pareto(result)))


def test_the_table_names_what_the_rows_share() -> None:
    title = "someone/small-model, wanda masks, fold mode; dense perplexity 30.10"
    assert comparison_table(RESULT).title == title
    updated = changed(settings={**RESULT["settings"], "update": "sparsegpt"})
    assert comparison_table(updated).title == title.replace("mode;", "mode, sparsegpt update;")
