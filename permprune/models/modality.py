"""The kind of input that a model takes: text, sentences to label or to embed, images or speech."""

from __future__ import annotations

from typing import Literal

from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from transformers import PreTrainedModel

    from permprune.models.forward import argument_names, is_causal_lm
    from permprune.models.pooling import pooling_of

Kind = Literal["text", "sentences", "embeddings", "images", "speech"]


EXAMPLES_PER_WINDOW: dict[Kind, int] = {"text": 1, "sentences": 32, "embeddings": 8, "images": 8, "speech": 1}
"""Examples that replace one window of text: a window gives many predictions, a sentence or an image only one.

An embedding tells more than a label: fewer are needed, and with fewer in a step there are more steps.
"""

BATCH_MULTIPLIER: dict[Kind, int] = {"text": 1, "sentences": 8, "embeddings": 8, "images": 8, "speech": 1}
"""Number of examples in a batch for each window of text that the batch size counts."""

EVALUATION_WINDOWS = 24
"""Windows of the evaluation, by default."""

EVALUATION_BATCH = 4
"""Windows of text, or prompts, of a forward pass in the evaluation."""


ANSWERED_ONCE = 32
"""Examples with one label each, such as images, for a window of text in the evaluation: many, to measure as well."""


def evaluation_count(model: PreTrainedModel, windows: int) -> int:
    """Return the number of examples that so many windows of the evaluation are."""
    return windows * (ANSWERED_ONCE if EXAMPLES_PER_WINDOW[kind_of(model)] > 1 else 1)


def evaluation_batch(model: PreTrainedModel) -> int:
    """Return the number of examples of a forward pass in the evaluation."""
    return EVALUATION_BATCH * BATCH_MULTIPLIER[kind_of(model)]


def kind_of(model: PreTrainedModel) -> Kind:
    """The kind of input that a model takes: windows of text, sentences that it labels or embeds, images, or speech."""
    if model.main_input_name == "pixel_values":
        return "images"
    if model.main_input_name in ("input_features", "input_values"):
        return "speech"
    if pooling_of(model):
        return "embeddings"
    classifies = "labels" in argument_names(model) and model.get_output_embeddings() is None
    return "sentences" if classifies and not is_causal_lm(model) else "text"
