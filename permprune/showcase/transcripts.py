"""What a model of speech writes down."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.evaluation.speech import transcribed
from permprune.examples import Examples
from permprune.models.forward import frozen
from permprune.showcase.base import Showing
from permprune.system.device import compute_device


class Transcripts(Showing):
    """The transcripts of several utterances; their labels are the expected ones."""

    kind = "transcripts"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.longest = 2 * examples["labels"].shape[1]
        note = "The likeliest token each time; case and punctuation as the word error rate has them."
        super().__init__([f"utterance {number}" for number in range(1, len(examples) + 1)], note)

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        inputs = self.examples.to(compute_device(self.model))
        with frozen(self.model):
            pairs = transcribed(self.model, inputs, self.tokenizer, self.longest)
        self.expected = [reference for reference, _ in pairs]
        return [written for _, written in pairs]
