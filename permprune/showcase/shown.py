"""The examples of a run, and the answers of its models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from permprune.checkpoints.record import Example, Showcase, SizeAndSpeed
from permprune.errors import first_line
from permprune.examples import Examples
from permprune.models.processors import Processor
from permprune.showcase.base import NotShown, Showing
from permprune.showcase.kinds import showing_of
from permprune.system.progress import log


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
