"""The classes or scores that a model gives to texts, images or sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permprune.examples import IGNORED, Examples
from permprune.models.forward import frozen, run_model
from permprune.showcase.base import NotShown, Showing
from permprune.system.device import compute_device


class Classes(Showing):
    """The class that a model gives to each of the examples; their labels are the expected ones."""

    kind = "classes"

    def __init__(self, model: PreTrainedModel, examples: Examples, given: list[str]) -> None:
        self.names = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
        labels = examples.get("labels")
        expected = None if labels is None else [None if label == IGNORED else self._named(label) for label in labels]
        super().__init__(given, self._note(labels), expected)
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

    def _note(self, labels: Tensor | None) -> str:
        return "The likeliest class of each example." if labels is None else "Each example's label, and the answers."


class Scores(Classes):
    """The score that a model with one output gives to each of the examples."""

    kind = "scores"  # type: ignore[assignment]

    def _values(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def _named(self, value: Tensor) -> str:
        return f"{float(value):.2f}"
