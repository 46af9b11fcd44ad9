"""How much work a run does."""

import json
import pickle
from pathlib import Path

import pytest

from permprune import PermpruneError, PruneConfig
from permprune.config import DEFAULTS, EFFORTS
from permprune.plan import calibration_count
from permprune.report.run import render

from ..modalities import make
from ..records import record_of
from .running import fails, run

pytestmark = pytest.mark.usefixtures("pictureless")


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_sets_what_is_not_given(effort: str) -> None:
    chosen = DEFAULTS | EFFORTS[effort]
    config = PruneConfig(effort=effort)
    assert {name: getattr(config, name) for name in DEFAULTS} == chosen
    assert PruneConfig(seed=3).replace(effort=effort) == PruneConfig(effort=effort, seed=3)
    config = PruneConfig(samples=24).replace(effort=effort, permute="newton")
    assert (config.permute, config.samples) == ("newton", chosen["samples"])
    assert PruneConfig(effort=effort, samples=192).replace(seed=1).samples == 192
    unlimited = PruneConfig(effort=effort, permute="newton", minutes=None)
    assert unlimited.replace(seed=1).minutes is None
    assert pickle.loads(pickle.dumps(unlimited)).given == {"permute", "minutes"}


def test_an_effort_draws_fewer_images_than_windows_of_text() -> None:
    vit = make("vit")
    assert calibration_count(vit, PruneConfig(effort="hour")) == 8 * 768
    assert calibration_count(vit, PruneConfig(effort="minutes")) == 8 * 192
    for samples in (1000, 3072):
        given = PruneConfig(effort="hour", samples=samples)
        assert calibration_count(vit, given) == calibration_count(vit, given.replace(seed=1)) == 8 * samples
    assert calibration_count(make("whisper"), PruneConfig(effort="hour")) == 768
    assert calibration_count(make("bert"), PruneConfig(effort="hour")) == 32 * 3072


def test_without_an_effort_the_defaults_hold() -> None:
    assert PruneConfig().effort is None
    assert {name: getattr(PruneConfig(), name) for name in DEFAULTS} == DEFAULTS


def test_an_unknown_effort_names_the_known() -> None:
    with pytest.raises(PermpruneError, match=r"effort is 'hours': did you mean \"hour\"\?"):
        PruneConfig(effort="hours")


def test_prune_records_the_effort(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    small = ["--calibration", tiny_text, "--data", tiny_text, "--length", "16", "--samples", "24", "--windows", "2"]
    out = tmp_path / "out"
    code, _, stderr = run("-v", "prune", tiny_checkpoint, *small, "--effort", "seconds", "--out", out)
    assert code == 0 and "effort seconds: ria on 24 windows" in " ".join(stderr.split())
    settings = json.loads((out / "permprune.json").read_text())["settings"]
    assert (settings["effort"], settings["permute"], settings["samples"]) == ("seconds", "ria", 24)
    assert "<dt>effort</dt><dd>seconds</dd>" in (out / "report.html").read_text()
    figures = [tiny_checkpoint, "--length", "16", "--effort", "hour", "--json", tmp_path / "plan.json"]
    for options, minutes in (([], 55), (["--minutes", "7"], 7), (["--minutes", "none", "--permute", "ria"], None)):
        assert run("plan", *figures, *options)[0] == 0
        assert json.loads((tmp_path / "plan.json").read_text())["settings"]["minutes"] == minutes
    assert "minutes is 'long': give a number above 0, or none" in fails("plan", *figures, "--minutes", "long")
    line = fails("prune", tiny_checkpoint, *small, "--effort", "day", "--out", tmp_path / "day")
    assert line == "permprune: effort is 'day': choose one of seconds, minutes, hour"


def test_a_permuter_that_is_given_overrides_that_of_the_effort() -> None:
    config = PruneConfig(effort="hour")
    chosen = PruneConfig(effort="hour", permute="ria")
    assert (chosen.permute, chosen.samples) == ("ria", config.samples)


def test_the_report_tells_what_each_stage_of_the_search_brought() -> None:
    losses = [("search", 3.9, True), ("search", 3.5, True), ("search", 4.0, False), ("training", 3.25, True)]
    curve = [
        {"round": number, "loss": loss, "kept": kept, "seconds": 1.0, "stage": stage}
        for number, (stage, loss, kept) in enumerate(losses)
    ]
    page = render(record_of(curve=curve).to_json())
    rows = [("start", "", "", "3.900"), ("search", "2", "1", "\N{MINUS SIGN}0.400")]
    for name, *others in (*rows, ("training", "1", "1", "\N{MINUS SIGN}0.250"), ("end", "", "", "3.250")):
        assert f'<th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in others) in page
    assert "What each stage brought" not in render(record_of().to_json())
