"""The sweep: its cells, what they give, and that nothing is done twice after a kill."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from permprune import Evaluation, Result, TaskList, compare
from permprune.config import PruneConfig
from permprune.errors import PermpruneError
from permprune.jobs.sweep import Cell, pareto, plan_cells
from permprune.jobs.sweep import sweep as run_sweep
from permprune.jobs.trials import Trials
from permprune.permuters.registry import PERMUTERS

Figures = dict[str, Any]


@pytest.fixture
def setting(tiny_checkpoint: Path, tiny_text: Path) -> tuple[str, PruneConfig, Evaluation]:
    settings = PruneConfig(calibration=str(tiny_text), samples=24, length=16, shared=True)
    return str(tiny_checkpoint), settings, Evaluation(str(tiny_text), 4, 16, shared=True)


def key(row: Figures) -> tuple[str, str, float | None]:
    return row["pattern"], row["method"], row["minutes"]


def results(figures: Figures) -> dict[tuple[str, str, float | None], tuple[float, float, float]]:
    return {key(row): (row["perplexity"], row["gap_closed"], row["bytes"]) for row in figures["rows"]}


def test_cells_are_every_combination_that_differs() -> None:
    cells = plan_cells(["2:4", "mixed", "2:4"], ["ria", "newton", "none"], [20, 5])
    assert cells == [
        Cell(pattern, method, minutes)
        for pattern in ("2:4", "mixed")
        for method, minutes in (("none", None), ("ria", None), ("newton", 5), ("newton", 20))
    ]
    assert plan_cells(["1:4"], ["newton"], []) == [Cell("1:4", "none"), Cell("1:4", "newton")]
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("patterns", "methods", "budgets", "message"),
    [
        (["24"], [], [], "no N:M pattern"),
        (["2:4"], ["luck"], [], "unknown permuter"),
        (["2:4"], [], [0.0], "budgets is 0.0"),
        ([], [], [], "one pattern at least"),
    ],
)
def test_bad_cells_are_refused(patterns: list[str], methods: list[str], budgets: list[float], message: str) -> None:
    with pytest.raises(PermpruneError, match=message):
        plan_cells(patterns, methods, budgets)


def test_what_would_fail_later_fails_at_once(setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path) -> None:
    name, settings, evaluation = setting
    with pytest.raises(PermpruneError, match="which 5 does not divide"):
        run_sweep(name, tmp_path / "out", ["2:4", "1:5"], [], [], settings, evaluation)
    with pytest.raises(PermpruneError, match="jobs is 0: give a whole number from 1"):
        run_sweep(name, tmp_path / "out", ["2:4"], [], [], settings, evaluation, jobs=0)
    assert list(tmp_path.glob("out*")) == []


def test_the_rows_are_those_of_compare(setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path) -> None:
    name, settings, evaluation = setting
    figures = run_sweep(name, tmp_path / "out", ["2:4", "4:8"], ["ria", "newton:rounds=5"], [], settings, evaluation)
    assert figures["metric"] == "perplexity" and len(figures["rows"]) == 6
    compared = compare(name, ["ria", "newton:rounds=5"], settings, evaluation)
    expected = {row["method"]: row for row in compared["rows"]}
    assert figures["dense"]["perplexity"] == expected["dense"]["perplexity"]
    for row in figures["rows"][:3]:
        assert row["perplexity"] == expected[row["method"]]["perplexity"]
        assert row["gap_closed"] == expected[row["method"]]["gap_closed"]
        assert row["layers"] == {"2:4": 14} and row["size"] < 1
    assert figures["rows"][5]["curve"] and not figures["rows"][4]["curve"]
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written == json.loads(json.dumps(figures))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures.json", "pareto.png", "report.html"]
    assert not (tmp_path / "out.partial").exists()


def test_a_mix_has_the_size_of_its_pattern(setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path) -> None:
    figures = run_sweep(
        setting[0],
        tmp_path / "out",
        ["mixed", "2:4"],
        [],
        [],
        PruneConfig(**{**vars(setting[1]), "mode": "gather"}),
        setting[2],
    )
    mixed, plain = figures["rows"]
    assert len(mixed["layers"]) > 1 and sum(mixed["layers"].values()) == 14
    assert mixed["size"] == pytest.approx(plain["size"], rel=0.05)  # index bits differ


def test_an_interrupted_sweep_goes_on_without_doing_a_cell_twice(
    setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, settings, evaluation = setting
    asked = (["2:4", "1:4"], ["random", "newton:rounds=5"], [])
    whole = run_sweep(name, tmp_path / "whole", *asked, settings, evaluation)
    done: list[str] = []
    original = Trials.run

    def counted(self: Trials, *args: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        trial = original(self, *args)
        done.append(args[0].name)
        return trial

    monkeypatch.setattr(Trials, "run", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(name, out, *asked, settings, evaluation)
    assert not out.exists() and len(list((tmp_path / "out.partial" / "cells").iterdir())) == 4
    with pytest.raises(PermpruneError, match="--resume"):
        run_sweep(name, out, *asked, settings, evaluation)
    with pytest.raises(PermpruneError, match="another seed"):
        run_sweep(name, out, *asked, PruneConfig(**{**vars(settings), "seed": 1}), evaluation, resume=True)
    assert done == ["none", "random", "newton", "none"]
    monkeypatch.setattr(Trials, "run", lambda self, *args: done.append(args[0].name) or original(self, *args))  # type: ignore[func-returns-value]
    assert results(run_sweep(name, out, *asked, settings, evaluation, resume=True)) == results(whole)
    assert done[4:] == ["random", "newton"] and not (tmp_path / "out.partial").exists()


def test_a_larger_budget_goes_on_where_the_smaller_one_stopped(
    setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path
) -> None:
    name, settings, evaluation = setting
    figures = run_sweep(name, tmp_path / "out", ["2:4"], ["newton:rounds=5"], [1e-6, 60], settings, evaluation)
    alone = run_sweep(name, tmp_path / "alone", ["2:4"], ["newton:rounds=5"], [], settings, evaluation)
    short, long = figures["rows"][1:]
    assert len(short["curve"]) == 1 and long["curve"][0] == short["curve"][0], "one search, not two"
    assert long["perplexity"] == alone["rows"][1]["perplexity"]
    losses = [[point["loss"] for point in row["curve"]] for row in (long, alone["rows"][1])]
    assert losses[0] == losses[1]


def test_a_cell_that_is_not_finite_is_a_row_like_others(
    setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([10.0, math.inf, 12.0])
    monkeypatch.setattr(
        "permprune.jobs.trials.Meter.__call__",
        lambda self: Result("t", "perplexity", next(measured), 60, unit="tokens"),
    )
    name, settings, evaluation = setting
    figures = run_sweep(name, tmp_path / "out", ["2:4"], ["ria"], [], settings, evaluation)
    assert [row["perplexity"] for row in figures["rows"]] == [math.inf, 12.0]
    assert [row["front"] for row in figures["rows"]] == [False, True]
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["rows"][0]["perplexity"] is None


def test_tasks_are_asked_of_the_dense_model_once_and_have_a_front_of_their_own(
    setting: tuple[str, PruneConfig, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.5, 0.6, 0.7, 0.4])
    monkeypatch.setattr(TaskList, "load", lambda self: lambda *asked: [Result("piqa", "acc", next(scores), 100, 0.05)])
    name, settings, evaluation = setting
    asked = dataclasses.replace(evaluation, tasks=TaskList(("piqa",)))
    figures = run_sweep(name, tmp_path / "out", ["2:4", "1:4"], ["random"], [], settings, asked)
    assert figures["dense"]["score"] == 0.9 and next(scores, None) is None
    assert [row["score"] for row in figures["rows"]] == [0.5, 0.6, 0.7, 0.4]
    assert [row["score_front"] for row in figures["rows"]] == [False, False, True, False]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4, 10.0), (4, 9.0), (5, 9.0), (6, 8.0), (7, 8.5), (6, math.inf)]
    assert pareto(points, "perplexity") == [False, True, False, True, False, False]
    assert pareto([(4, 0.5), (5, 0.4), (6, 0.9)], "top-1 accuracy") == [True, False, True]


def test_file_names_of_all_methods_differ() -> None:
    names = [Cell("2:4", method, minutes).name for method in PERMUTERS for minutes in (None, 5)]
    assert len(set(names)) == len(names) and not any(":" in name or "/" in name for name in names)
