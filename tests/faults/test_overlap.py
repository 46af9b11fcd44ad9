"""An evaluation on data that were calibrated on is said to be one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from permprune import Examples
from permprune.data.overlap import overlap, warn_of_overlap
from permprune.report.words import overlap_note

from ..cli.running import fails, run
from ..fixtures import SENTENCES

pytestmark = pytest.mark.slow

WORDS = [word for sentence in SENTENCES for word in sentence.split()]


def cut(text: Tensor, length: int, first: int = 0) -> Examples:
    """Windows of a text, tokens (count,)."""
    text = text[first:]
    return Examples.of(text[: len(text) // length * length].view(-1, length))


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(50_000, (count,), generator=torch.Generator().manual_seed(seed))


def test_windows_that_are_the_same() -> None:
    windows = cut(tokens(24 * 64), 64)
    assert overlap([windows[:6], windows[6:]], windows) == 1.0
    assert overlap([windows[:6]], windows) == 0.25
    assert overlap([windows], windows[[3]]) == 1.0  # type: ignore[index]
    assert overlap([cut(tokens(4096, 1), 64)], windows) == 0.0


@pytest.mark.parametrize(("length", "first"), [(64, 17), (50, 0), (100, 33), (512, 5), (64, 1)])
def test_windows_that_are_cut_otherwise(length: int, first: int) -> None:
    text = tokens(5000)
    assert overlap([cut(text, length, first)], cut(text, 64)) > 0.65
    half = overlap([cut(text[:2500], length, first)], cut(text, 64))
    assert 0.35 < half < 0.51


def test_runs_shorter_than_a_span_are_chance() -> None:
    text, other = tokens(640), tokens(640, 1)
    other[100:131] = text[200:231]  # 31 tokens
    assert overlap([cut(text, 64)], cut(other, 64)) == 0.0
    other[64:104] = text[200:240]  # 40 tokens, in one window of each
    assert overlap([cut(text, 64, first=8)], cut(other, 64)) == 40 / 640


def test_short_windows_are_looked_for_whole() -> None:
    windows = cut(tokens(160), 16)
    assert overlap([windows[:5]], windows) == 0.5
    assert overlap([cut(tokens(160), 16, first=1)], windows) == 0.0
    assert overlap([cut(tokens(160), 80)], windows) == 1.0


def test_a_decoders_labels_and_masks_are_no_matter() -> None:
    windows = cut(tokens(640), 64)
    shown = Examples({"input_ids": windows["input_ids"], "decoder_input_ids": tokens(10)[:, None]})
    assert overlap([shown], windows) == 1.0


def test_sentences_images_and_speech_are_compared_by_content() -> None:
    ids, mask = tokens(80).view(8, 10), torch.ones(8, 10, dtype=torch.int64)
    mask[::2, 6:] = 0
    sentences = Examples({"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(8)})
    wider = {
        "input_ids": torch.nn.functional.pad(ids, (0, 5), value=3),
        "attention_mask": torch.nn.functional.pad(mask, (0, 5)),
    }
    other = Examples({**wider, "labels": torch.zeros(8, dtype=torch.int64)})
    assert overlap([other[:3]], sentences) == 3 / 8
    pixels = torch.rand(6, 3, 8, 8)
    assert overlap([Examples({"pixel_values": pixels[:2]})], Examples({"pixel_values": pixels})) == 2 / 6
    waves = torch.rand(4, 100) + 1
    waves[1, 60:] = 0
    longer = Examples({"input_values": torch.nn.functional.pad(waves[:2], (0, 20))})
    assert overlap([longer], Examples({"input_values": waves})) == 0.5
    assert overlap([longer], Examples({"input_values": torch.zeros(2, 5)})) == 0.0
    assert overlap([longer], Examples({"pixel_values": pixels})) == 0.0


def test_quotations_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    for share in (0.0, 0.005):
        warn_of_overlap(share)
        assert not caplog.records and overlap_note(share) == ""
    warn_of_overlap(0.25)
    assert "25 % of the evaluation" in caplog.text and overlap_note(0.25).startswith("25 %")
    assert overlap_note(None) == ""


def write_text(path: Path, seed: int) -> Path:
    generator = random.Random(seed)
    path.write_text(" ".join(generator.choice(WORDS) for _ in range(1500)))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts of the same words that share no sentence."""
    return write_text(tmp_path / "one.txt", 1), write_text(tmp_path / "two.txt", 2)


SMALL = ["--length", "64", "--samples", "200", "--windows", "4"]


def said(text: str) -> str:
    return " ".join(text.split())


def test_compare_says_so(texts: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = texts
    figures = tmp_path / "figures.json"
    for data, share in ((one, 1.0), (two, 0.0)):
        arguments = ["--calibration", one, "--data", data, *SMALL, "--methods", "none", "--json", figures]
        code, stdout, stderr = run("compare", tiny_checkpoint, *arguments)
        assert code == 0, stderr
        assert json.loads(figures.read_text())["measured"]["overlap"] == pytest.approx(share, abs=0.1)
        assert said(stderr).count("% of the evaluation data are also in the calibration data") == int(share)
        assert said(stdout).count("% of the evaluation data are also in the calibration data") == int(share)


def test_a_comparison_of_patterns_says_so_once(texts: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--calibration", texts[0], "--data", texts[0], *SMALL, "--methods", "none", "--patterns", "1:4,2:4"]
    code, stdout, stderr = run("compare", tiny_checkpoint, *arguments, "--out", out)
    assert code == 0, stderr
    assert json.loads((out / "figures.json").read_text())["measured"]["overlap"] == pytest.approx(1.0, abs=0.1)
    for text in (stdout, stderr, (out / "report.html").read_text()):
        assert said(text).count("% of the evaluation data are also in the calibration data") == 1


OFFLOADED = ["--length", "16", "--samples", "24", "--windows", "20", "--set", "offload=disk"]


@pytest.mark.parametrize(("other", "options"), [(0, []), (1, []), (0, OFFLOADED)])
def test_prune_says_so(
    other: int, options: list[str], texts: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--calibration", texts[0], "--data", texts[other], *SMALL, "--order", "none", *options]
    code, stdout, stderr = run("prune", tiny_checkpoint, *arguments, "--out", out)
    assert code == 0, stderr
    found = json.loads((out / "permprune.json").read_text())["measured"]["overlap"]
    assert found == pytest.approx(1 - other, abs=0.8 if options else 0.1)  # few windows are drawn from the text
    for text in (stdout, stderr, (out / "report.html").read_text()):
        assert said(text).count("% of the evaluation data are also in the calibration data") == 1 - other


@pytest.mark.parametrize("written", ["./pictures", "PATH", "link", "other/../pictures/"])
def test_one_folder_however_its_path_is_written(
    written: str, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part gets a half of it."""
    generator = np.random.default_rng(0)
    for number in range(30):
        place = tmp_path / "pictures" / ("cat" if number % 2 else "dog") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(place)
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    data = ["--data", written.replace("PATH", str(tmp_path / "pictures")), "--windows", "2"]
    options = ["--calibration", "pictures", *data, "--methods", "none", "--json", "figures.json"]
    code, _, stderr = run("compare", tiny_vit, *options)
    assert code == 0, stderr
    assert json.loads((tmp_path / "figures.json").read_text())["measured"]["overlap"] == 0.0
    assert "twice" in fails("compare", tiny_vit, *options, "--calibration", data[1])


def test_finetune_says_that_it_measures_on_its_training_data(
    texts: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ["--data", texts[0], "--dev", texts[0], "--length", "64", "--epochs", "1", "--rows", "200"]
    code, _, stderr = run("finetune", tiny_checkpoint, *options, "--out", tmp_path / "out")
    assert code == 0 and "% of the evaluation data are also in the training data" in said(stderr), stderr


def test_images_that_are_in_both(tiny_vit: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(256, size=(16, 16, 3), dtype=np.uint8)
        for folder in ("one", "two") if number < 20 else ("two",):
            place = tmp_path / folder / ("cat" if number % 2 else "dog") / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place)
    figures = tmp_path / "figures.json"
    data = ["--calibration", tmp_path / "one", "--data", tmp_path / "two", "--windows", "2", "--json", figures]
    code, stdout, stderr = run("compare", tiny_vit, *data, "--methods", "none")
    assert code == 0 and "50 % of the evaluation" in said(stdout), stderr
    assert json.loads(figures.read_text())["measured"]["overlap"] == 0.5
