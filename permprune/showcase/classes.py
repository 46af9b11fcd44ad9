"""What a model says of texts, images or sounds: their classes or scores, or their nearest neighbours."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.examples import IGNORED, Examples
from permprune.losses.targets import embed_all
from permprune.models.forward import frozen, run_model
from permprune.models.modality import pooling_of
from permprune.models.processors import Processor, image_processor_of
from permprune.showcase.base import NotShown, Showing, spread, text_of, thumbnail
from permprune.system.device import compute_device

AMONG_TEXTS, AMONG_IMAGES = 256, 48
"""The most examples among which neighbours are sought."""

FEATURES = ("image_embeds", "pooler_output")
"""Outputs with the features of a whole image; of a model without them the mean over the positions is taken."""

BATCH = 16
"""Examples of a forward pass."""


class Classes(Showing):
    """The class that a model gives to each of the examples; their labels are the expected ones."""

    kind = "classes"

    def __init__(self, model: PreTrainedModel, examples: Examples, given: list[str]) -> None:
        self.names = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
        labels = examples.get("labels")
        expected = None if labels is None else [None if label == IGNORED else self._named(label) for label in labels]
        note = "The likeliest class of each example." if labels is None else "Each example's label, and the answers."
        super().__init__(given, note, expected)
        self.model, self.examples = model, examples

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        with frozen(self.model):
            output: Any = run_model(self.model, self.examples.to(compute_device(self.model)))
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2 or len(logits) != len(self.given):
            raise NotShown(f"a {type(self.model).__name__} gives an example no class and no score")
        return [self._named(value) for value in self._values(logits.float().cpu())]

    def _values(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def _named(self, value: Tensor) -> str:
        return self.names.get(int(value), str(int(value)))


class RegressionScores(Classes):
    """The score that a model with one output gives to each of the examples."""

    kind = "scores"  # type: ignore[assignment]

    def _values(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def _named(self, value: Tensor) -> str:
        return f"{float(value):.2f}"


class Neighbours(Showing):
    """The nearest of several examples, of which `names` are the texts, to each of `count` of them."""

    kind = "neighbours"

    def __init__(self, model: PreTrainedModel, examples: Examples, names: list[str], count: int) -> None:
        if len(examples) < 3:
            raise NotShown("there are fewer than three examples")
        self.model, self.examples, self.names = model, examples, names
        self.places = spread(len(examples), count)
        note = f"The nearest neighbour of each among {len(names)} examples; marked by whether it is the dense model's."
        super().__init__([names[place] for place in self.places], note)

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        with frozen(self.model):
            values = self._embedded()
        similar = values[self.places] @ values.T
        similar[torch.arange(len(self.places)), self.places] = -torch.inf
        return [self.names[nearest] for nearest in similar.argmax(1).tolist()]

    @abstractmethod
    def _embedded(self) -> Tensor:
        """The embeddings of all examples, of length 1, fp32 (examples, channels)."""


class SentenceNeighbours(Neighbours):
    """The nearest texts by a sentence encoder's embeddings."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, count: int
    ) -> None:
        some = examples[:AMONG_TEXTS]
        super().__init__(model, some, [text_of(some, tokenizer, place) for place in range(len(some))], count)

    def _embedded(self) -> Tensor:
        pooling = pooling_of(self.model)
        assert pooling is not None
        return embed_all(self.model, self.examples, pooling, BATCH)


class ImageNeighbours(Neighbours):
    """The nearest images by the features of a model without a head."""

    def __init__(self, model: PreTrainedModel, processor: Processor | None, examples: Examples, count: int) -> None:
        some, maker = examples[:AMONG_IMAGES], image_processor_of(processor)
        super().__init__(model, some, [f"image {number}" for number in range(1, len(some) + 1)], count)
        drawn = [thumbnail(pixels, maker) for pixels in some["pixel_values"]]
        self.gallery = {name: picture for name, picture in zip(self.names, drawn, strict=True) if picture}
        self.pictures = [drawn[place] for place in self.places]

    def _embedded(self) -> Tensor:
        device = compute_device(self.model)
        parts = [self._features(run_model(self.model, part.to(device))) for part in self.examples.split(BATCH)]
        return F.normalize(torch.cat(parts), dim=1)

    def _features(self, output: Any) -> Tensor:
        values: Tensor | None = next(
            (value for name in FEATURES if (value := getattr(output, name, None)) is not None), None
        )
        if values is None and isinstance(states := getattr(output, "last_hidden_state", None), Tensor):
            values = states.flatten(1, -2).mean(1)
        if values is None:
            raise NotShown(f"a {type(self.model).__name__} gives an image no features")
        return values.flatten(1).float().cpu()
