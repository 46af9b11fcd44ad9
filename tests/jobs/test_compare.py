"""Comparisons: their cells, what these give, and that nothing is done twice after a kill."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from permprune import Evaluation, Newton, Pattern, PermpruneError, PruneConfig, compare
from permprune.engine.session import Session
from permprune.evaluation.result import PERPLEXITY, TOP_1_ACCURACY, Result
from permprune.jobs.cells import Cell, Comparison, pareto, plan_cells
from permprune.permuters.registry import PERMUTERS, permuters

pytestmark = pytest.mark.slow

Setting = tuple[str, PruneConfig, Evaluation]
Key = tuple[str, str, float | None]


@pytest.fixture
def setting(tiny_checkpoint: Path, tiny_text: Path) -> Setting:
    settings = PruneConfig(calibration=str(tiny_text), samples=24, length=16, shared=True)
    return str(tiny_checkpoint), settings, Evaluation(str(tiny_text), 4, 16, shared=True)


def results(found: Comparison) -> dict[Key, tuple[float, float | None, float]]:
    return {(row.pattern, row.method, row.minutes): (row.result.value, row.gap_closed, row.bytes) for row in found.rows}


def measured(
    setting: Setting, out: Path, patterns: list[str], methods: Sequence[str] = (), **options: Any
) -> Comparison:
    model, config, evaluation = setting
    return compare(model, methods, config, out=out, patterns=patterns, **{"evaluation": evaluation, **options})


def test_cells_are_every_combination_that_differs() -> None:
    cells = plan_cells(["2:4", "mixed", "2:4"], permuters(["none", "ria", "newton"]), [20, 5])
    assert cells == [
        Cell(pattern, method, minutes)
        for pattern in ("2:4", "mixed")
        for method, minutes in (("none", None), ("ria", None), ("newton", 5), ("newton", 20))
    ]
    assert plan_cells([Pattern(1, 4)], permuters(["newton"]), []) == [Cell("1:4", "newton")]
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("patterns", "budgets", "message"), [(["24"], [], "not an N:M pattern"), (["2:4"], [0.0], "budgets is 0.0")]
)
def test_bad_cells_are_refused(patterns: list[str], budgets: list[float], message: str) -> None:
    with pytest.raises(PermpruneError, match=message):
        plan_cells(patterns, {}, budgets)


def test_what_would_fail_later_fails_at_once(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(PermpruneError, match="which 5 does not divide"):
        measured(setting, tmp_path / "out", ["2:4", "1:5"])
    limited = (setting[0], setting[1].replace(pattern="mixed", max_loss=0.1), setting[2])
    with pytest.raises(PermpruneError, match="compare measures no loss to limit"):
        measured(limited, tmp_path / "out", ["mixed"])
    assert list(tmp_path.glob("out*")) == []


def test_a_pattern_alone_gives_the_same_rows(setting: Setting, tmp_path: Path) -> None:
    found = measured(setting, tmp_path / "out", ["2:4", "4:8"], ["ria", "newton:rounds=2"])
    assert found.metric == PERPLEXITY and len(found.rows) == 6
    name, config, evaluation = setting
    alone = compare(name, {"ria": "ria", "newton:rounds=2": Newton(rounds=2)}, config, evaluation=evaluation)
    expected = {row.method: row for row in alone.rows}
    assert found.dense.result == alone.dense.result
    assert alone.best.result.value == min(row.result.value for row in alone.rows)
    for row in found.rows[:3]:
        assert row.result == expected[row.method].result
        assert row.gap_closed == expected[row.method].gap_closed
        assert row.layers == {"2:4": 14} and row.size < 1
    assert found.rows[5].curve and not found.rows[4].curve
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures.json", "report.html"]
    assert not (tmp_path / "out.partial").exists()


def test_a_model_in_memory_is_compared_and_is_dense_again(
    setting: Setting, tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    named = measured(setting, tmp_path / "named", ["2:4", "1:4"], ["ria"])
    held = (tiny_llama, *setting[1:])
    found = measured(held, tmp_path / "held", ["2:4", "1:4"], ["ria"], processor=tiny_tokenizer)  # type: ignore[arg-type]
    assert results(found) == results(named)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_a_mix_has_the_size_of_its_pattern(setting: Setting, tmp_path: Path) -> None:
    gathered = (setting[0], setting[1].replace(mode="gather"), setting[2])
    most, mixed, plain = measured(gathered, tmp_path / "out", ["mixed@0.8", "mixed", "2:4"]).rows
    assert sum(mixed.layers.values()) <= 14
    assert mixed.size == pytest.approx(plain.size, rel=0.05)  # index bits differ
    assert most.size > mixed.size


def test_an_interrupted_comparison_goes_on_without_doing_a_cell_twice(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (["2:4", "1:4"], ["random", "newton:rounds=2"])
    whole = measured(setting, tmp_path / "whole", *asked)
    done: list[str] = []
    original = Session.attempt

    def counted(self: Session, *args: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        trial = original(self, *args)
        done.append(args[0].name)
        return trial

    monkeypatch.setattr(Session, "attempt", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        measured(setting, out, *asked)
    assert not out.exists() and len(list((tmp_path / "out.partial" / "cells").iterdir())) == 4
    with pytest.raises(PermpruneError, match="--resume"):
        measured(setting, out, *asked)
    with pytest.raises(PermpruneError, match="another calibration examples, seed: use"):
        measured((setting[0], setting[1].replace(seed=1), setting[2]), out, *asked, resume=True)
    assert done == ["none", "random", "newton", "none"]
    monkeypatch.setattr(Session, "attempt", lambda self, *args: done.append(args[0].name) or original(self, *args))  # type: ignore[func-returns-value]
    assert results(measured(setting, out, *asked, resume=True)) == results(whole)
    assert done[4:] == ["random", "newton"] and not (tmp_path / "out.partial").exists()


def test_a_larger_budget_goes_on_where_the_smaller_one_stopped(setting: Setting, tmp_path: Path) -> None:
    method = ["newton:rounds=2"]
    short, long = measured(setting, tmp_path / "out", ["2:4"], method, budgets=[1e-6, 60]).rows[1:]
    alone = measured(setting, tmp_path / "alone", ["2:4"], method).rows[1]
    assert len(short.curve) == 1 and [point.loss for point in short.curve] == [long.curve[0].loss]
    assert long.curve[0].seconds > short.curve[0].seconds, "one search, not two: its start counts once, and is read"
    assert long.result == alone.result
    losses = [[point.loss for point in row.curve] for row in (long, alone)]
    assert losses[0] == losses[1]


def test_a_cell_that_is_not_finite_is_a_row_like_others(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([10.0, math.inf, 12.0])
    monkeypatch.setattr(
        "permprune.engine.measuring.Meter.__call__",
        lambda *_: [Result("t", PERPLEXITY, next(values), count=60, unit="tokens")],
    )
    rows = measured(setting, tmp_path / "out", ["2:4"], ["ria"]).rows
    assert [row.result.value for row in rows] == [math.inf, 12.0]
    assert [row.front for row in rows] == [False, True]
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["rows"][0]["perplexity"] is None


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4, 10.0), (4, 9.0), (5, 9.0), (6, 8.0), (7, 8.5), (6, math.inf)]
    assert pareto(points, PERPLEXITY) == [False, True, False, True, False, False]
    assert pareto([(4, 0.5), (5, 0.4), (6, 0.9)], TOP_1_ACCURACY) == [True, False, True]


def test_file_names_of_all_methods_differ() -> None:
    methods = [*PERMUTERS, "CE / KL", "CE : KL", "newton:rounds=2"]
    names = [Cell("2:4", method, minutes).name for method in methods for minutes in (None, 5)]
    assert len(set(names)) == len(names) and not any(":" in name or "/" in name for name in names)
