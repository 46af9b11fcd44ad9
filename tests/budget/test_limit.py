"""A limit of the loss: what a run tries, what it tells, and that the result keeps to it."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from permprune import PermpruneError, PruneConfig, compare
from permprune.budget import sensitivity

from ..cli.running import fails, run

pytestmark = pytest.mark.slow

SMALL = ["--length", "16", "--samples", "24", "--windows", "4", "--order", "newton:rounds=1", "--pattern", "mixed"]


@pytest.fixture
def source(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return [str(tiny_checkpoint), "--calibration", str(tiny_text), "--data", str(tiny_text), *SMALL]


def test_the_fewest_weights_within_a_limit_are_kept(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gradients = tmp_path / "out", Mock(side_effect=sensitivity.slopes)
    monkeypatch.setattr("permprune.budget.allocate.slopes", gradients)
    code, stdout, _ = run("prune", *source, "--out", out, "--max-loss", "50%", "--candidates", "6:8,2:4,1:4")
    assert code == 0 and "A mix of patterns" in stdout
    record = json.loads((out / "permprune.json").read_text())
    measured, attempts = record["measured"], record["mix"]["attempts"]
    assert measured["pruned"] <= 1.5 * measured["dense"]
    assert gradients.call_count == 3  # candidates, however many shares are tried
    assert len(attempts) > 1 and attempts[-1]["confirmed"] == pytest.approx(measured["pruned"], rel=1e-3)
    assert record["mix"]["keep"] <= min(attempt["keep"] for attempt in attempts) + 1e-6
    assert run("verify", out)[0] == 0


def test_a_limit_that_no_mix_keeps_to_is_one_line(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permprune.engine.limiting.loss_of", lambda *_: 0.5)  # a random model loses nothing
    message = fails("prune", *source, "--out", tmp_path / "out", "--max-loss", "1%", "--candidates", "2:4,1:4")
    assert "no mix that was tried loses at most" in message
    with pytest.raises(PermpruneError, match="measures no loss to limit"):
        compare(source[0], ["none"], PruneConfig(pattern="mixed", max_loss=0.01))
