"""Speech with transcripts."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.data.items import Item, Labels, Medium, Selection
from permprune.data.sources import LABEL_COLUMNS
from permprune.errors import PermpruneError
from permprune.examples import IGNORED
from permprune.models.forward import argument_names, writes_text
from permprune.models.generation import decoder_positions
from permprune.models.processors import Processor, feature_extractor_of, tokenizer_of
from permprune.system.progress import log

TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text")
Samples = np.ndarray[Any, np.dtype[np.float32]]
Sound = tuple[Samples, int]
"""Mono samples (count,) and the sampling rate in Hz."""

SHORTEST = 0.025
"""The shortest sound in seconds that is used: one frame of a spectrogram, or what a model of waves reads for one."""


def open_sound(file: Path | BytesIO, name: str) -> Sound:
    """Read a sound. Raises `PermpruneError`, which names it `name`, if it is damaged or soundfile is not installed."""
    try:
        import soundfile
    except ImportError as error:
        raise PermpruneError("reading sound needs soundfile: pip install 'permprune[audio]'") from error
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise PermpruneError(f"cannot read the sound {name}: remove or repair it") from error
    return samples.mean(axis=1), rate


SOUND = Medium("sound", (".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav"), columns=("audio",), decode=open_sound)


def load_speech(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection
) -> dict[str, Tensor]:
    """Load utterances, preprocessed by the model's processor. Raises as `Medium.items` and `Labels` do.

    Returns `input_features` (count, bands, frames) or `input_values` (count, samples), and `attention_mask` if the
    processor produces one. If the model takes labels, also `labels`: the tokens of the transcripts, int64
    (count, tokens), padded with -100, or of a classifier the classes, (count,); only calibration does without them.
    Utterances longer than the model's maximum, or shorter than `SHORTEST`, are left out with a warning.

    `source` is one of

    * a folder of audio files, with a table of their texts or labels (`METADATA`), or for a classifier with a sub-folder
      for each class;
    * a `datasets` name as in `load_documents`.
    """
    maker: Any = feature_extractor_of(processor)
    taken = argument_names(model)
    classes = Labels(model.config) if "labels" in taken and not writes_text(model) else None
    items, waves = _heard(SOUND.items(source, selection), maker)
    labels = [item.label(TEXT_COLUMNS if classes is None else LABEL_COLUMNS, classes) for item in items]
    made = maker(
        waves,
        sampling_rate=maker.sampling_rate,
        padding="max_length" if getattr(maker, "n_samples", None) else True,
        return_tensors="pt",
    )
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in made.items() if name in taken}
    if selection.part == "calibration" and not any(label is not None for label in labels):
        what = "transcripts" if classes is None else "classes"
        log.info("the sound in %s has no %s: the dense model's outputs are the targets", source, what)
    elif classes is not None:
        tensors["labels"] = classes.tensor(labels, [item.name for item in items])
    elif "labels" in taken:
        tensors["labels"] = _transcripts(items, labels, processor, model)
    return tensors


def _heard(items: list[Item], maker: Any) -> tuple[list[Item], list[Samples]]:
    """The items of a length that the model can process, and their samples at the extractor's rate.

    Logs a warning if others are left out. Raises `PermpruneError` if none is left.
    """
    rate, longest = maker.sampling_rate, getattr(maker, "n_samples", None)  # None: there is no limit
    waves = [_resampled(item.read(), rate) for item in items]
    limits = f"{SHORTEST:g} s or longer" if longest is None else f"{SHORTEST:g} to {longest / rate:g} s long"
    kept = [index for index, wave in enumerate(waves) if SHORTEST * rate <= len(wave) <= (longest or len(wave))]
    if not kept:
        raise PermpruneError(
            f"{items[0].name} has {len(waves[0]) / rate:.3g} s, and none of {len(items)} utterances is {limits}, "
            "as the model needs: cut or replace them"
        )
    if len(kept) < len(items):
        left_out = len(items) - len(kept)
        log.warning("%d of %d utterances are not %s, and are left out", left_out, len(items), limits)
    for index in kept:
        if not np.isfinite(waves[index]).all():
            raise PermpruneError(f"the sound {items[index].name} has samples that are not finite: remove or repair it")
    return [items[index] for index in kept], [waves[index] for index in kept]


def _transcripts(items: list[Item], texts: list[Any], processor: Processor | None, model: PreTrainedModel) -> Tensor:
    """The tokens of the transcripts, padded, without the decoder start token, which the model prepends itself.

    They are cut at the positions of the model's decoder, with a warning.
    """
    tokenizer = tokenizer_of(processor)
    for item, text in zip(items, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise PermpruneError(f"{item.name} has no transcript: add one, or remove the file")
    rows = _encoded([text.strip() for text in texts], tokenizer)
    start, most = getattr(model.config, "decoder_start_token_id", None), decoder_positions(model)
    rows = [row[int(row[:1] == [start]) :] for row in rows]
    if long := sum(len(row) > (most or len(row)) for row in rows):
        log.warning("%d of %d transcripts are longer than the model's %d positions, and are cut", long, len(rows), most)
        rows = [row[:most] for row in rows]
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, IGNORED)


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts as written, or all in capitals or in small letters if the tokenizer knows more of these.

    Logs a warning if it does not know some of them.
    """
    unknown = tokenizer.unk_token_id
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    if unknown in (None, tokenizer.eos_token_id, tokenizer.pad_token_id) or not any(unknown in row for row in rows):
        return rows
    cases = [rows, *(tokenizer([change(text) for text in texts])["input_ids"] for change in (str.upper, str.lower))]
    rows = min(cases, key=lambda rows: sum(row.count(unknown) for row in rows))
    if count := sum(row.count(unknown) for row in rows):
        log.warning("the tokenizer does not know %d of the %d tokens in the transcripts", count, sum(map(len, rows)))
    return rows


def _resampled(sound: Sound, wanted: int) -> Samples:
    """The samples of a sound, resampled to `wanted` Hz."""
    samples, rate = sound
    if rate == wanted or not len(samples):
        return samples
    from scipy.signal import resample_poly  # imported here because it is slow to import

    resampled: Samples = resample_poly(samples, wanted, rate).astype(np.float32)
    return resampled
