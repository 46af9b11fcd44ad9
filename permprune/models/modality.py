"""What a model reads: text, sentences, images or speech."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from permprune.models.forward import writes
from permprune.models.signature import argument_names

Kind = Literal["text", "sentences", "images", "speech"]


EXAMPLES_PER_WINDOW: dict[Kind, int] = {"text": 1, "sentences": 32, "images": 8, "speech": 1}
"""Examples that are asked for in place of one window of text: a window has many answers, a sentence or an image one."""

BATCH_MULTIPLIER: dict[Kind, int] = {"text": 1, "sentences": 8, "images": 8, "speech": 1}
"""Examples that pass through a model in place of one window of text."""


def kind_of(model: PreTrainedModel) -> Kind:
    """What a model reads: windows of text, sentences with a label each, images, or speech."""
    if model.main_input_name == "pixel_values":
        return "images"
    if model.main_input_name in ("input_features", "input_values"):
        return "speech"
    classifies = "labels" in argument_names(model) and model.get_output_embeddings() is None
    return "sentences" if classifies and not writes(model) else "text"
