"""Calibration data from several sources."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from permprune import PermpruneError, PruneConfig
from permprune.checkpoints.io import read_model
from permprune.data.text import POOL, tokenize
from permprune.examples import Examples
from permprune.plan import calibration_examples

from ..cli.running import fails, run
from ..fixtures import SENTENCES

pytestmark = pytest.mark.usefixtures("pictureless")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """A long text, and a short one of other sentences."""
    paths = [tmp_path / "long.txt", tmp_path / "short.txt"]
    for path, sentences, times in zip(paths, (SENTENCES[:2], SENTENCES[2:]), (60, 3), strict=True):
        path.write_text("\n".join(sentences * times))
    return [str(path) for path in paths]


def windows(checkpoint: Path, calibration: list[str], samples: int) -> list[list[int]]:
    model, tokenizer, _ = read_model(str(checkpoint))
    config = PruneConfig(calibration=calibration, samples=samples, length=16)
    found: list[list[int]] = calibration_examples(model, tokenizer, config)["input_ids"].tolist()
    return found


def test_sources_take_turns(texts: list[str], tiny_checkpoint: Path) -> None:
    long, short = (windows(tiny_checkpoint, [text], 99) for text in texts)
    mixed = windows(tiny_checkpoint, texts, 9)
    assert len(mixed) == 9 and all(window in long for window in mixed[0::2])
    assert all(window in short for window in mixed[1::2])


def test_a_source_with_less_text_is_spread_over_the_others(texts: list[str], tiny_checkpoint: Path) -> None:
    short = windows(tiny_checkpoint, texts[1:], 99)
    mixed = windows(tiny_checkpoint, texts, 40)
    assert len(short) < 20 and len(mixed) == 20 + len(short)
    places = [place for place, window in enumerate(mixed) if window in short]
    assert sorted(mixed[place] for place in places) == sorted(short)
    steps = [after - before for before, after in pairwise([-1, *places, len(mixed)])]
    assert max(steps) <= 20 / len(short) + 2


def test_gradients_see_other_text_than_the_held_out_loss(tiny_checkpoint: Path, tmp_path: Path) -> None:
    letters = Random(0).choices("abdehinortuw", k=4000)
    (tmp_path / "text.txt").write_text(" ".join(letters))
    model, tokenizer, _ = read_model(str(tiny_checkpoint))
    config = PruneConfig(calibration=str(tmp_path / "text.txt"), samples=48, length=16)
    inorder = tokenize([" ".join(letters)], tokenizer, 16, POOL * 48).tolist()
    places = [inorder.index(window) for window in calibration_examples(model, tokenizer, config)["input_ids"].tolist()]
    assert sum(config.shares(48)[:2]) == 24 and max(places[:24]) < min(places[24:])
    assert places[24:] != sorted(places[24:])


def test_one_source_is_no_mixture(texts: list[str]) -> None:
    assert PruneConfig(calibration=texts[:1]).identity() == PruneConfig(calibration=texts[0]).identity()
    assert PruneConfig(calibration=texts).identity() == PruneConfig(calibration=tuple(texts)).identity()
    examples = Examples.of(torch.arange(6).view(2, 3))
    assert Examples.interleave([examples]) is examples


@pytest.mark.parametrize("given", [[], ["a.txt", None], 3, [["a.txt"]]])
def test_only_names_are_sources(given: object) -> None:
    with pytest.raises(PermpruneError, match=r"calibration is .*: give a file, a folder or a data set id, or a list"):
        PruneConfig(calibration=given)  # type: ignore[arg-type]


def test_the_command_line_records_every_source(texts: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    both = [option for text in texts for option in ("--calibration", text)]
    small = ["--order", "none", "--samples", "24", "--windows", "2", "--length", "16", "--data", texts[1]]
    code, _, stderr = run("prune", tiny_checkpoint, *both, *small, "--out", tmp_path / "out")
    assert code == 0 and "of the evaluation data are also in the calibration data" in " ".join(stderr.split())
    assert json.loads((tmp_path / "out/permprune.json").read_text())["settings"]["calibration"] == texts
    assert "| calibration | `long.txt, short.txt` |" in (tmp_path / "out/README.md").read_text()
    assert ", ".join(texts) in (tmp_path / "out/report.html").read_text()
    line = fails("prune", tiny_checkpoint, *both, *both[:2], *small, "--out", tmp_path / "other")
    assert line == f"permprune: calibration names {texts[0]} twice: give it once"
