"""Word error rate of a speech recognition model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Wav2Vec2CTCTokenizer

from permprune.errors import PermpruneError
from permprune.evaluation.batched import per_example
from permprune.evaluation.result import WORD_ERROR_RATE, Result, ratio_error
from permprune.examples import IGNORED, Examples
from permprune.models.forward import is_ctc, padding_of, run_model
from permprune.models.generation import generate


def word_error_rate(
    model: nn.Module, examples: Examples, tokenizer: PreTrainedTokenizerBase, *, batch: int = 8
) -> Result:
    """Measure the wrong, missing and extra words per word of the transcripts, which are the examples' "labels".

    The model decodes greedily, with a decoder at most twice as many tokens as the longest transcript has. The standard
    error is that over utterances by the delta method, None for a single one. Raises `PermpruneError` if the transcripts
    have no words, and if jiwer is not installed.
    """
    process_words, longest = _jiwer().process_words, 2 * examples["labels"].shape[1]

    def counted(inputs: Examples) -> Tensor:
        texts = transcribed(model, inputs, tokenizer, longest)
        return torch.tensor([_errors(*pair, process_words) for pair in texts]).T

    wrong, words = per_example(model, examples, batch, counted, rows=2, what="word error rate")
    if not words.any():
        raise PermpruneError("the transcripts have no words: give labels that the tokenizer can read")
    return Result(
        "speech recognition",
        WORD_ERROR_RATE,
        float(wrong.sum() / words.sum()),
        count=int(words.sum()),
        stderr=ratio_error(wrong, words),
        unit="words",
        terms=(wrong, words),
    )


def transcribed(
    model: nn.Module, inputs: Examples, tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[tuple[str, str]]:
    """Return the transcript of each utterance and what the model writes for it, a decoder at most `longest` tokens.

    Both are normalised by the tokenizer's own normaliser, or else lose case and punctuation.
    """
    spoken = _ctc_text(model, inputs) if is_ctc(model) else generate(model, inputs, longest)
    return list(zip(_texts(inputs["labels"], tokenizer), _texts(spoken, tokenizer), strict=True))


def _errors(reference: str, written: str, process_words: Callable[[str, str], Any]) -> tuple[int, int]:
    """Return (wrong, missing and extra words of `written`, all words of `reference`) by jiwer's `process_words`."""
    if not reference:
        return len(written.split()), 0
    counted = process_words(reference, written)
    return counted.substitutions + counted.deletions + counted.insertions, len(reference.split())


def _ctc_text(model: Any, batch: Examples) -> Tensor:
    """The most likely token of each frame, int64 (batch, frames); repetitions, blanks and padding are `IGNORED`."""
    logits: Tensor = run_model(model, batch).logits
    ids = logits.argmax(-1)
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    mask = padding_of(model, batch).mask_of(logits)
    left_out = again | (ids == model.config.pad_token_id) | (torch.zeros_like(again) if mask is None else ~mask)
    return ids.masked_fill(left_out, IGNORED)


def _texts(ids: Tensor, tokenizer: Any) -> list[str]:
    """Decode token ids (batch, length), without those that are `IGNORED`, to normalised text."""
    plain = {"group_tokens": False} if isinstance(tokenizer, Wav2Vec2CTCTokenizer) else {}  # it merges double letters
    if getattr(tokenizer, "english_spelling_normalizer", None):
        normalise = tokenizer.normalize
    else:
        normalise = tokenizer.basic_normalize if hasattr(tokenizer, "basic_normalize") else _plain()
    texts = [tokenizer.decode(row[row != IGNORED], skip_special_tokens=True, **plain) for row in ids]
    return [str(normalise(str(text))).strip() for text in texts]


def _jiwer() -> Any:
    """The package jiwer. Raises `PermpruneError` if it is not installed."""
    try:
        import jiwer
    except ImportError as error:
        raise PermpruneError("the word error rate needs jiwer: pip install 'permprune[audio]'") from error
    return jiwer


@cache
def _plain() -> Callable[[str], str]:
    """A transform that removes case and punctuation; built on first use, as listing all punctuation takes a while."""
    jiwer = _jiwer()
    steps = [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
    compose: Callable[[str], str] = jiwer.Compose(steps)
    return compose
