"""The choice of what is shown for a model and its examples."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.examples import Examples
from permprune.models.forward import is_causal_lm, is_encoder_decoder, writes_text
from permprune.models.modality import kind_of
from permprune.models.processors import Processor, image_processor_of, tokenizer_of
from permprune.models.signature import argument_names
from permprune.showcase.base import NotShown, Showing, spread, text_of
from permprune.showcase.classes import Classes, Scores
from permprune.showcase.neighbours import ImageNeighbours, SentenceNeighbours
from permprune.showcase.pictures import thumbnail
from permprune.showcase.texts import answers_about_images, continuations, outputs
from permprune.showcase.transcripts import Transcripts
from permprune.showcase.words import Words

STRIP = 4
"""Examples with a class are short: so many are shown in the place of one text."""


def showing_of(model: PreTrainedModel, processor: Processor | None, examples: Examples, count: int) -> Showing:
    """Return up to `count` of the examples as something that a model with a person's judgement can answer.

    Of classes and scores there are up to `STRIP` * `count`. Raises `NotShown` if nothing of the model can be judged.
    """
    match kind_of(model):
        case "images":
            if "labels" not in argument_names(model):
                return ImageNeighbours(model, processor, examples, count)
            return _images(model, processor, examples, STRIP * count)
        case "speech" if writes_text(model):
            if "labels" not in examples:
                raise NotShown("the sound has no transcripts")
            return Transcripts(model, tokenizer_of(processor), examples[torch.tensor(spread(len(examples), count))])
        case "speech":
            shown = examples[: STRIP * count]
            return Classes(model, shown, [f"sound {number}" for number in range(1, len(shown) + 1)])
        case "embeddings":
            return SentenceNeighbours(model, tokenizer_of(processor), examples, count)
        case "sentences":
            shown, tokenizer = examples[: STRIP * count].trimmed(), tokenizer_of(processor)
            kind = Scores if model.config.num_labels == 1 else Classes
            return kind(model, shown, [text_of(shown, tokenizer, place) for place in range(len(shown))])
    return _texts(model, tokenizer_of(processor), examples, count)


def _images(model: PreTrainedModel, processor: Processor | None, examples: Examples, count: int) -> Showing:
    shown, maker = examples[:count], image_processor_of(processor)
    showing = Classes(model, shown, [f"image {number}" for number in range(1, len(shown) + 1)])
    showing.pictures = [thumbnail(pixels, maker) for pixels in shown["pixel_values"]]
    return showing


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, count: int) -> Showing:
    if "pixel_values" in examples:
        return answers_about_images(model, tokenizer, examples, count)
    if is_causal_lm(model):
        return continuations(model, tokenizer, examples["input_ids"], count)
    if is_encoder_decoder(model) and model.can_generate():
        return outputs(model, tokenizer, examples["input_ids"], count)
    if model.get_output_embeddings() is not None:
        return Words(model, tokenizer, examples["input_ids"], count)
    raise NotShown(f"a {type(model).__name__} has no head that gives an answer")
