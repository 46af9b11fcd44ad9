"""Examples of the evaluation data for a person to judge, and what a model answers to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from permprune.examples import Examples

Kind = Literal["texts", "words", "classes", "scores", "transcripts", "neighbours"]

LONGEST = 160
"""The most characters of a text that is shown."""


class Showing(ABC):
    """Examples that a model can answer, one answer each.

    `given` are the examples as text, `expected` the right answers and `pictures` their thumbnails, as in `Example`;
    None where there is none. `note` says how answers come about. `gallery` has thumbnails of answers that are images.
    """

    kind: ClassVar[Kind]
    note: str
    given: list[str]
    expected: list[str | None]
    pictures: list[str | None]
    gallery: dict[str, str]

    def __init__(self, given: list[str], note: str, expected: Sequence[str | None] | None = None) -> None:
        self.given, self.note = given, note
        self.expected = list(expected) if expected else [None] * len(given)
        self.pictures, self.gallery = [None] * len(given), {}

    @abstractmethod
    def __call__(self) -> list[str]:
        """Return the answers of the model with its current weights, one for each example."""


class NotShown(Exception):
    """Raised if there are no examples to show; the message says why, as the end of a sentence."""


def spread(count: int, wanted: int) -> list[int]:
    """Return the indices of up to `wanted` of `count` examples, evenly spread."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def text_of(examples: Examples, tokenizer: PreTrainedTokenizerBase, place: int) -> str:
    """Return the text of an example, on one line and shortened; the texts of a pair are divided by a slash."""
    ids, mask = examples["input_ids"][place], examples.get("attention_mask")
    parts: list[list[int]] = [[]]
    for token in (ids if mask is None else ids[mask[place].bool()]).tolist():
        if token in (tokenizer.sep_token_id, tokenizer.eos_token_id):
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts]
    return shortened(" / ".join(text for text in texts if text.strip()))


def shortened(text: str) -> str:
    """Return a text on one line, cut after `LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}\N{HORIZONTAL ELLIPSIS}"
