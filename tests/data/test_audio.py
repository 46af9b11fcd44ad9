"""Speech and its transcripts."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForSequenceClassification, Wav2Vec2Model

from permprune.checkpoints.io import read_model
from permprune.data.audio import load_speech
from permprune.data.items import Selection
from permprune.errors import PermpruneError

TEXTS = {"1-2-0000": "MARIE SIGHED", "1-2-0001": "A BRISK WIND", "1-2-0002": "HAD COME UP"}
SECONDS = {"1-2-0000": 0.1, "1-2-0001": 0.2, "1-2-0002": 0.3}


def tone(path: Path, seconds: float, rate: int = 16_000, pitch: float = 200.0, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    return path


def describe(folder: Path, texts: dict[str, str], name: str = "metadata.csv", column: str = "text") -> Path:
    """Write the table of a folder with the texts of these files."""
    rows = [{"file_name": file, column: text} for file, text in texts.items()]
    if name.endswith("jsonl"):
        table = "\n".join(map(json.dumps, rows))
    else:
        table = f"file_name,{column}\n" + "".join(f'{file},"{text}"\n' for file, text in texts.items())
    (folder / name).write_text(table)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three utterances with a table of their transcripts."""
    for name, seconds in SECONDS.items():
        tone(tmp_path / "speech" / "1" / f"{name}.flac", seconds)
    return describe(tmp_path / "speech", {f"1/{name}.flac": text for name, text in TEXTS.items()})


@pytest.fixture
def ctc(tiny_ctc: Path) -> tuple[PreTrainedModel, Any]:
    model, processor, _ = read_model(str(tiny_ctc))
    return model, processor


@pytest.fixture
def whisper(tiny_whisper: Path) -> tuple[PreTrainedModel, Any]:
    model, processor, _ = read_model(str(tiny_whisper))
    return model, processor


def spoken(found: dict[str, torch.Tensor], processor: Any) -> list[str]:
    rows = [row[row >= 0] for row in found["labels"]]
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True, group_tokens=False) for row in rows]
    return [text.removeprefix("<|notimestamps|>") for text in texts]


def test_waves_are_padded_to_the_longest(ctc: tuple[PreTrainedModel, Any], folder: Path) -> None:
    model, processor = ctc
    found = load_speech(folder, model, processor, Selection("calibration", 9))
    assert found.keys() == {"input_values", "attention_mask", "labels"}
    assert found["input_values"].shape == found["attention_mask"].shape == (3, 4800)
    samples = dict(zip(spoken(found, processor), found["attention_mask"].sum(dim=1).tolist(), strict=True))
    assert samples == {TEXTS[name]: round(16_000 * seconds) for name, seconds in SECONDS.items()}
    assert found["labels"].shape == (3, 12) and (found["labels"] == -100).any()
    assert model(**found).loss.isfinite()


def test_spectrograms_have_the_length_that_the_model_hears(whisper: tuple[PreTrainedModel, Any], folder: Path) -> None:
    model, processor = whisper
    found = load_speech(folder, model, processor, Selection("calibration", 9))
    assert found.keys() == {"input_features", "labels"}
    assert found["input_features"].shape == (3, 8, 100)
    assert sorted(spoken(found, processor)) == sorted(TEXTS.values())
    assert not (found["labels"][:, 0] == model.config.decoder_start_token_id).any()  # the model puts it there
    assert model(**found).loss.isfinite()


def test_calibration_needs_no_transcripts(whisper: tuple[PreTrainedModel, Any], folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    assert load_speech(folder, *whisper, Selection("calibration", 9)).keys() == {"input_features"}
    with pytest.raises(PermpruneError, match="has no transcript"):
        load_speech(folder, *whisper, Selection("evaluation", 9))
    describe(folder, {"1/1-2-0001.flac": "A BRISK WIND", "1/1-2-0002.flac": ""})
    with pytest.raises(PermpruneError, match=r"1-2-0002.flac has no transcript: add one"):
        load_speech(folder, *whisper, Selection("calibration", 9))


@pytest.mark.parametrize(("name", "column"), [("metadata.csv", "transcription"), ("metadata.jsonl", "text")])
def test_a_table_has_transcripts(ctc: tuple[PreTrainedModel, Any], tmp_path: Path, name: str, column: str) -> None:
    tone(tmp_path / "listed" / "a.wav", 0.1)
    describe(tmp_path / "listed", {"a.wav": "SO, YES"}, name, column)
    found = load_speech(tmp_path / "listed", *ctc, Selection("evaluation", 9))
    assert found["labels"].tolist() == [ctc[1].tokenizer("SO, YES")["input_ids"]]


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2)])
def test_sound_of_any_rate_is_resampled(
    ctc: tuple[PreTrainedModel, Any], tmp_path: Path, rate: int, channels: int
) -> None:
    model, processor = Wav2Vec2Model(Wav2Vec2Config(num_hidden_layers=0)), ctc[1]
    expected = load_speech(tone(tmp_path / "a" / "a.wav", 0.5).parent, model, processor, Selection("evaluation", 1))
    other = tone(tmp_path / "b" / "a.wav", 0.5, rate, channels=channels).parent
    found = load_speech(other, model, processor, Selection("evaluation", 1))
    assert found["input_values"].shape == expected["input_values"].shape == (1, 8000)
    inner = slice(200, -200)
    assert torch.allclose(found["input_values"][0, inner], expected["input_values"][0, inner], atol=0.02)


def test_what_is_too_long_is_left_out(
    whisper: tuple[PreTrainedModel, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1-2-0000", "1-2-0001"):
        tone(folder / "1" / f"{name}.flac", 1.01)
    with caplog.at_level(logging.WARNING, "permprune"):
        found = load_speech(folder, *whisper, Selection("evaluation", 9))
    assert spoken(found, whisper[1]) == ["HAD COME UP"]
    assert "2 of 3 utterances are not 0.025 to 1 s long, and are left out" in caplog.text
    tone(folder / "1" / "1-2-0002.flac", 1.01)
    with pytest.raises(PermpruneError, match=r"000\d.flac has 1.01 s, and none of 3 utterances is 0.025 to 1 s long"):
        load_speech(folder, *whisper, Selection("evaluation", 9))


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("name", ["ctc", "whisper"])
def test_what_is_too_short_is_left_out(
    name: str, samples: int, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = request.getfixturevalue(name)
    tone(tmp_path / "a" / "short.wav", samples / 8000, 8000)
    tone(tmp_path / "a" / "long.wav", 0.1)
    describe(tmp_path / "a", dict.fromkeys(("short.wav", "long.wav"), "HAD COME UP"))
    found = load_speech(tmp_path / "a", model, processor, Selection("evaluation", 9))
    assert len(found["labels"]) == 1 and model(**found).loss.isfinite()
    assert "1 of 2 utterances are not 0.025 " in caplog.text
    describe(tmp_path / "a", {"short.wav": "HAD COME UP"})
    with pytest.raises(PermpruneError, match=r"short\.wav has .* s, and none of 1 utterances is 0.025"):
        load_speech(tmp_path / "a", model, processor, Selection("evaluation", 9))


def test_samples_that_are_not_finite(whisper: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    soundfile.write(tmp_path / "bad" / "a.wav", np.full(8000, np.nan, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(PermpruneError, match=r"a\.wav has samples that are not finite"):
        load_speech(tmp_path / "bad", *whisper, Selection("calibration", 9))


def test_transcripts_are_in_the_letters_that_the_tokenizer_knows(
    ctc: tuple[PreTrainedModel, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tone(tmp_path / "said" / "a.wav", 0.1)
    describe(tmp_path / "said", {"a.wav": "a brisk wind"})
    assert spoken(load_speech(tmp_path / "said", *ctc, Selection("evaluation", 9)), ctc[1]) == ["A BRISK WIND"]
    assert not caplog.records
    describe(tmp_path / "said", {"a.wav": "a brisk wind, 2"})
    load_speech(tmp_path / "said", *ctc, Selection("evaluation", 9))
    assert "the tokenizer does not know 2 of the 15 tokens in the transcripts" in caplog.text


def test_transcripts_are_cut_at_the_positions(
    whisper: tuple[PreTrainedModel, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tone(tmp_path / "said" / "a.wav", 0.1)
    describe(tmp_path / "said", {"a.wav": "a brisk wind " * 20})
    found = load_speech(tmp_path / "said", *whisper, Selection("calibration", 9))
    assert found["labels"].shape == (1, 64) and whisper[0](**found).loss.isfinite()
    assert "1 of 1 transcripts are longer than the model's 64 positions, and are cut" in caplog.text


def test_a_classifier_of_speech_has_classes(ctc: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    config = Wav2Vec2Config(num_hidden_layers=0, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model = Wav2Vec2ForSequenceClassification(config)
    for number in range(4):
        tone(tmp_path / "words" / ("yes" if number % 2 else "No") / f"{number}.wav", 0.1 + number / 100)
    found = load_speech(tmp_path / "words", model, ctc[1].feature_extractor, Selection("evaluation", 9))
    samples = found["attention_mask"].sum(dim=1)
    assert torch.equal(found["labels"], (samples // 160 % 2).long())
    (tmp_path / "words" / "metadata.csv").write_text("file_name,label\nNo/0.wav,yes\n")
    assert load_speech(tmp_path / "words", model, ctc[1], Selection("evaluation", 9))["labels"].tolist() == [1]


def test_a_data_set(ctc: tuple[PreTrainedModel, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(folder / "1" / f"{name}.flac") for name in TEXTS]
    stored = [
        {"path": None, "bytes": Path(files[0]).read_bytes()},
        *({"path": file, "bytes": None} for file in files[1:]),
    ]
    rows = datasets.Dataset.from_dict({"audio": stored, "text": list(TEXTS.values())}).to_iterable_dataset()
    rows = rows.cast_column("audio", datasets.Audio())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    found = load_speech("name", *ctc, Selection("calibration", 9))
    samples = dict(zip(spoken(found, ctc[1]), found["attention_mask"].sum(dim=1).tolist(), strict=True))
    assert samples == {TEXTS[name]: round(16_000 * seconds) for name, seconds in SECONDS.items()}


def test_bad_sources_are_one_line(ctc: tuple[PreTrainedModel, Any], folder: Path, tmp_path: Path) -> None:
    model, processor = ctc
    (tmp_path / "empty").mkdir()
    with pytest.raises(PermpruneError, match="empty holds no sound: give a folder of"):
        load_speech(tmp_path / "empty", model, processor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match="no sound at"):
        load_speech("./none", model, processor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match="the model has none"):
        load_speech(folder, model, None, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match="text needs a tokenizer, and the model has none"):
        load_speech(folder, model, processor.feature_extractor, Selection("evaluation", 9))
    with pytest.raises(PermpruneError, match=r"a\.wav is a file: give the folder of the sound"):
        load_speech(tone(tmp_path / "a.wav", 0.1), model, processor, Selection("evaluation", 9))
    (folder / "1" / "1-2-0000.flac").write_bytes(b"no sound")
    with pytest.raises(PermpruneError, match=r"cannot read the sound .*1-2-0000\.flac"):
        load_speech(folder, model, processor, Selection("evaluation", 9))
    (folder / "1" / "1-2-0000.flac").unlink()
    with pytest.raises(
        PermpruneError, match=r"metadata\.csv lists 1-2-0000\.flac, and there is no such file beside it"
    ):
        load_speech(folder, model, processor, Selection("evaluation", 9))


def test_without_soundfile_it_is_asked_for(
    ctc: tuple[PreTrainedModel, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(PermpruneError, match=r"pip install 'permprune\[audio\]'"):
        load_speech(folder, *ctc, Selection("evaluation", 9))
