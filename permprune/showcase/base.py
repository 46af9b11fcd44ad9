"""Examples of the evaluation data for a person to judge, and what a model answers to them."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.examples import Examples

Kind = Literal["texts", "words", "classes", "scores", "transcripts", "neighbours"]

LONGEST = 160
"""The most characters of a text that is shown."""

SIDE = 96
"""The longest side of a thumbnail in pixels."""


class Showing(ABC):
    """Examples that a `model` can answer, one answer each.

    `given` are the examples as text, `expected` the right answers and `pictures` their thumbnails, as in `Example`;
    None where there is none. `note` says how answers come about. `gallery` has thumbnails of answers that are images.
    """

    kind: ClassVar[Kind]
    model: PreTrainedModel

    def __init__(self, given: list[str], note: str, expected: Sequence[str | None] | None = None) -> None:
        self.given, self.note = given, note
        self.expected: list[str | None] = list(expected) if expected else [None] * len(given)
        self.pictures: list[str | None] = [None] * len(given)
        self.gallery: dict[str, str] = {}

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


def shortened(text: str, *, end: bool = False) -> str:
    """Return the first `LONGEST` characters of a text on one line, or the last ones, as of a text that is continued."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    return f"\N{HORIZONTAL ELLIPSIS}{line[-LONGEST:]}" if end else f"{line[:LONGEST]}\N{HORIZONTAL ELLIPSIS}"


def thumbnail(pixels: Tensor, processor: Any) -> str | None:
    """Return a thumbnail of an image (channels, height, width) as a model reads it: a JPEG file in base64.

    The normalisation of the image processor is undone. Returns None for a tensor that is not an image of 1 or 3
    channels.
    """
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        return None
    image = pixels.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, name)).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        image = image * std + mean
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).expand(-1, -1, 3)
    picture = Image.fromarray(levels.contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    file = BytesIO()
    picture.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
