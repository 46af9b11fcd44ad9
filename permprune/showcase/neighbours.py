"""The nearest neighbours of sentences by their embeddings."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.examples import Examples
from permprune.losses.embeddings import embed_all
from permprune.models.forward import frozen
from permprune.models.pooling import pooling_of
from permprune.showcase.base import NotShown, Showing, spread, text_of

AMONG = 256
"""The most texts among which neighbours are sought."""


class Neighbours(Showing):
    """The nearest of the other texts to each of several texts."""

    kind = "neighbours"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, count: int
    ) -> None:
        self.model, self.examples = model, examples[:AMONG]
        if len(self.examples) < 3:
            raise NotShown("there are fewer than three texts")
        self.places = spread(len(self.examples), count)
        self.texts = [text_of(self.examples, tokenizer, place) for place in range(len(self.examples))]
        note = f"The nearest neighbour of each text among {len(self.texts)} texts."
        super().__init__([self.texts[place] for place in self.places], note)

    def __call__(self) -> list[str]:
        pooling = pooling_of(self.model)
        assert pooling is not None
        with frozen(self.model):
            values = embed_all(self.model, self.examples, pooling, batch=32)
        similar = values[self.places] @ values.T
        similar[torch.arange(len(self.places)), self.places] = -torch.inf
        return [self.texts[nearest] for nearest in similar.argmax(1).tolist()]
