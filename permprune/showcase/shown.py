"""The examples of a run: what is shown for a model, and the answers of the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.checkpoints.record import Example, Showcase, SizeAndSpeed
from permprune.errors import first_line
from permprune.examples import Examples
from permprune.models.forward import argument_names, is_causal_lm, is_encoder_decoder, writes_text
from permprune.models.modality import kind_of
from permprune.models.processors import Processor, image_processor_of, tokenizer_of
from permprune.showcase.base import NotShown, Showing, spread, text_of, thumbnail
from permprune.showcase.classes import Classes, ImageNeighbours, RegressionScores, SentenceNeighbours
from permprune.showcase.texts import Transcripts, Words, answers, continuations, outputs
from permprune.system.progress import log

STRIP = 4
"""Examples with a class are short: so many are shown in the place of one text."""


class Shown:
    """Up to `count` examples of an evaluation for a person to judge, and what a model answers to them.

    Nothing that a model, its code or its tokenizer raises here ends a run: there are no examples then, and a sentence
    says why. `reason` is such a sentence for a run whose models cannot answer.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Processor | None, examples: Examples, count: int, *, reason: str = ""
    ) -> None:
        self._showing: Showing | None = None
        self._reason = reason or ("" if count else "none were asked for")
        if not self._reason:
            with self._guarded():
                self._showing = showing_of(model, processor, examples, count)

    def answers(self, model: PreTrainedModel | None = None) -> list[str]:
        """Return the answers of the model with its current weights, one for each example.

        Another `model`, as the same one packed, answers from here on.
        """
        answers: list[str] = []
        if self._showing is not None:
            self._showing.model = self._showing.model if model is None else model
            with self._guarded():
                answers = self._showing()
        return answers

    def beside(self, answers: Mapping[str, Sequence[str]], sides: dict[str, SizeAndSpeed]) -> Showcase:
        """Return the examples with the answers of several models, by name, and what else is known of these."""
        showing = self._showing
        if showing is None:
            return Showcase("", f"No examples are shown: {self._reason}.", [], sides)
        examples = []
        for place, given in enumerate(showing.given):
            texts = {name: several[place] for name, several in answers.items()}
            drawn = {name: showing.gallery[text] for name, text in texts.items() if text in showing.gallery}
            examples.append(Example(given, texts, showing.expected[place], showing.pictures[place], drawn))
        return Showcase(showing.kind, showing.note, examples, sides)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A context in which any error means that nothing is shown, and is logged unless it was to be expected."""
        try:
            yield
        except NotShown as error:
            self._showing, self._reason = None, str(error)
        except Exception as error:  # a model's own code, its `generate` or its tokenizer can raise any type
            self._showing, self._reason = None, first_line(error)
            log.warning("no examples are shown: %s", self._reason)


def showing_of(model: PreTrainedModel, processor: Processor | None, examples: Examples, count: int) -> Showing:
    """Return up to `count` of the examples as something that a model with a person's judgement can answer.

    Of classes and scores there are up to `STRIP` * `count`. Raises `NotShown` if nothing of the model can be judged.
    """
    match kind_of(model):
        case "images":
            if "labels" not in argument_names(model):
                return ImageNeighbours(model, processor, examples, count)
            shown, maker = examples[: STRIP * count], image_processor_of(processor)
            showing = Classes(model, shown, [f"image {number}" for number in range(1, len(shown) + 1)])
            showing.pictures = [thumbnail(pixels, maker) for pixels in shown["pixel_values"]]
            return showing
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
            kind = RegressionScores if model.config.num_labels == 1 else Classes
            return kind(model, shown, [text_of(shown, tokenizer, place) for place in range(len(shown))])
    return _texts(model, tokenizer_of(processor), examples, count)


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, count: int) -> Showing:
    if "labels" in examples:
        return answers(model, tokenizer, examples, count)
    if is_causal_lm(model):
        return continuations(model, tokenizer, examples["input_ids"], count)
    if is_encoder_decoder(model) and model.can_generate():
        return outputs(model, tokenizer, examples["input_ids"], count)
    if model.get_output_embeddings() is not None:
        return Words(model, tokenizer, examples["input_ids"], count)
    raise NotShown(f"a {type(model).__name__} has no head that gives an answer")
