"""Speech with transcripts."""

from __future__ import annotations

from functools import partial as bind
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.sources import (
    Item,
    dataset,
    find_column,
    find_list,
    list_files,
    listed_items,
    locate,
    pick_items,
    pick_rows,
    read_text,
    shares_rows,
    stored_file,
)
from permprune.errors import PermpruneError
from permprune.examples import Part
from permprune.models.processors import Processor, feature_extractor_of, tokenizer_of
from permprune.models.signature import argument_names
from permprune.system.progress import log

SUFFIXES = (".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav")
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text")
Samples = np.ndarray[Any, np.dtype[np.float32]]
Sound = tuple[Samples, int]
"""Mono samples (count,) and the sampling rate in Hz."""

IGNORED = -100
"""The label of positions that the loss ignores, as in Transformers."""


def load_speech(
    source: str | Path,
    model: PreTrainedModel,
    processor: Processor | None,
    part: Part,
    count: int,
    seed: int = 0,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Load up to `count` randomly chosen utterances, preprocessed by the model's processor.

    Returns `input_features` (count, bands, frames) or `input_values` (count, samples), and `attention_mask` if the
    processor produces one. If the model takes labels, also the tokens of the transcripts: `labels` int64
    (count, tokens), padded with -100; without any transcripts there are no labels, and only calibration accepts that.
    Utterances longer than the model's maximum are left out with a warning.

    `source` is one of

    * a folder of audio files with LibriSpeech's *.trans.txt files, or with a table that lists files and texts, named
      metadata or transcripts with suffix .csv, .tsv or .jsonl;
    * such a table;
    * a `datasets` name as in `load_documents`.

    With `shared`, the calibration and the evaluation part come from the same source, and each gets a disjoint half.
    Raises `PermpruneError` if the source cannot be read, all utterances are too long, or a transcript is missing.
    """
    maker: Any = feature_extractor_of(processor)
    taken = argument_names(model)
    path = locate(source, "sound")
    if path is None:
        items = _from_dataset(str(source), part, count, seed, shares_rows(str(source), shared))
    else:
        items = pick_items(_from_files(path), path, part, count, seed, shared)
    waves = [_resampled(item.read(), maker.sampling_rate) for item in items]
    longest = getattr(maker, "n_samples", None)
    heard = [at for at, wave in enumerate(waves) if longest is None or len(wave) <= longest]
    if len(heard) < len(items):
        log.warning(
            "%d of %d utterances are longer than the model can process and are left out",
            len(items) - len(heard),
            len(items),
        )
    if not heard:
        raise PermpruneError(
            f"all utterances in {source} exceed the model's {longest / maker.sampling_rate:g} s: cut them"
        )
    made = maker(
        [waves[at] for at in heard],
        sampling_rate=maker.sampling_rate,
        padding="max_length" if longest else True,
        return_tensors="pt",
    )
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in made.items() if name in taken}
    if part == "calibration" and not any(item.label for item in items):
        log.info("the sound in %s has no transcripts: the dense model's outputs are the targets", source)
    elif "labels" in taken:
        tensors["labels"] = _labels([items[at] for at in heard], processor, model.config)
    return tensors


def _labels(items: list[Item], processor: Processor | None, config: Any) -> Tensor:
    """The tokens of the transcripts, padded, without the decoder start token, which the model prepends itself."""
    tokenizer = tokenizer_of(processor)
    for item in items:
        if not isinstance(item.label, str) or not item.label.strip():
            raise PermpruneError(f"{item.name} has no transcript: add one, or remove the file")
    rows = [torch.tensor(tokenizer(item.label)["input_ids"]) for item in items]
    start = getattr(config, "decoder_start_token_id", None)
    rows = [row[int(len(row) > 0 and row[0].item() == start) :] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def _from_files(path: Path) -> list[Item]:
    if table := find_list(path):
        return listed_items(table, TEXT_COLUMNS, lambda file: _decode(file, str(file)))
    transcripts = {}
    for file in sorted(path.rglob("*.trans.txt")):
        for line in read_text(file).splitlines():
            name, _, text = line.partition(" ")
            transcripts[file.parent / name] = text
    items = []
    for file in list_files(path, SUFFIXES, "sound"):
        items.append(Item(str(file), bind(_decode, file, str(file)), transcripts.pop(file.with_suffix(""), None)))
    if transcripts:
        raise PermpruneError(
            f"{next(iter(transcripts))} has a transcript but no sound file: add the file, or remove the transcript"
        )
    return items


def _from_dataset(source: str, part: Part, count: int, seed: int, shared: bool) -> list[Item]:
    items = []
    with dataset(source, part) as rows:
        for name, row in pick_rows(rows, part, count, seed, shared):
            place = f"{source}, {name}"
            sound = stored_file(row[find_column(row, ("audio",), source)], place)
            text = next((row[key] for key in TEXT_COLUMNS if key in row), None)
            items.append(Item(place, bind(_decode, sound, place), text))
    return items


def _decode(file: Path | BytesIO, name: str) -> Sound:
    try:
        import soundfile
    except ImportError as error:
        raise PermpruneError("reading sound needs soundfile: pip install 'permprune[audio]'") from error
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise PermpruneError(f"cannot read the sound {name}: remove or repair it") from error
    return samples.mean(axis=1), rate


def _resampled(sound: Sound, wanted: int) -> Samples:
    """The samples of a sound, resampled to `wanted` Hz."""
    samples, rate = sound
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly  # imported here because it is slow to import

    common = gcd(rate, wanted)
    resampled: Samples = resample_poly(samples, wanted // common, rate // common).astype(np.float32)
    return resampled
