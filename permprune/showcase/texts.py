"""Texts that models write: continuations of prompts, filled-in words, what is said of an image, and transcripts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from permprune.evaluation.speech import transcribed
from permprune.examples import IGNORED, Examples
from permprune.models.forward import evaluating, frozen, is_encoder_decoder, run_model, typed_inputs
from permprune.showcase.base import NotShown, Showing, shortened, spread
from permprune.system.device import compute_device

PROMPT = 16
"""The tokens of a prompt: all have the same number, so that none is padded."""

WRITTEN = 40
"""The most tokens that a model writes."""

PENALTY = 1.3
"""The repetition penalty (Keskar et al. 2019, arXiv 1909.05858, who use 1.2): without one, small models repeat
themselves when they choose the likeliest token, dense or pruned."""

WORD_STARTS = ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\N{LOWER ONE EIGHTH BLOCK}")
"""First characters of the tokens that begin a word, in byte-pair and in SentencePiece vocabularies."""

SENTENCE_ENDS = (".", "!", "?")

CONTEXT = 12
"""The tokens on either side of a masked one that are shown and read."""


class Texts(Showing):
    """Texts that a model writes for each of several `inputs` of its `generate`.

    The likeliest token is chosen, with a repetition penalty.
    """

    kind = "texts"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: list[dict[str, Tensor]],
        given: list[str],
        expected: list[str] | None = None,
    ) -> None:
        note = f"Up to {WRITTEN} tokens, the likeliest each time, with a repetition penalty of {PENALTY:g}."
        super().__init__(given, note, expected)
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        texts = []
        with evaluating(self.model):
            for inputs in self.inputs:
                for ids in self._written(inputs):
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    texts.append(" ".join(text.split()))
        return texts

    def _written(self, inputs: dict[str, Tensor]) -> Tensor:
        """The tokens that the model adds to a batch of inputs, int64 (batch, tokens)."""
        model: Any = self.model
        defaults = model.generation_config
        pad, ends = defaults.pad_token_id, defaults.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=WRITTEN,
            do_sample=False,
            num_beams=1,
            repetition_penalty=PENALTY,
            eos_token_id=defaults.eos_token_id,
            pad_token_id=pad if pad is not None else ends[0] if isinstance(ends, list) else ends or 0,
            bos_token_id=defaults.bos_token_id,
            decoder_start_token_id=defaults.decoder_start_token_id,
        )
        ids: Tensor = model.generate(**typed_inputs(model, inputs), generation_config=settings)
        return ids if is_encoder_decoder(model) else ids[:, inputs["input_ids"].shape[1] :]


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, count: int) -> Texts:
    """Prompts from `count` windows of text, int64 (windows, tokens), that a language model continues.

    A prompt begins with a sentence of the window and ends with a word, as far as the vocabulary tells.
    """
    prompts = torch.stack([_prompt(windows[place], tokenizer) for place in spread(len(windows), count)])
    given = [shortened(str(tokenizer.decode(ids, skip_special_tokens=True))) for ids in prompts]
    ids = prompts.to(compute_device(model))
    return Texts(model, tokenizer, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], given)


def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, count: int) -> Texts:
    """What a model with an encoder and a decoder writes for the beginnings of `count` windows of text."""
    ids = windows[spread(len(windows), count), : 2 * PROMPT]
    given = [shortened(str(text)) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    ids = ids.to(compute_device(model))
    return Texts(model, tokenizer, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], given)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, count: int) -> Texts:
    """Prompts, some with images, up to the first answer, which the model gives; the labels are the expected answers."""
    inputs, given, expected = list[dict[str, Tensor]](), list[str](), list[str]()
    for place in spread(len(examples), count):
        example = examples[place : place + 1]
        ids, labels = example["input_ids"], example["labels"]
        answered = labels[0].ne(IGNORED)
        asked = int(answered.int().argmax())
        first_answer = labels[0, asked:][answered[asked:].int().cumprod(0).bool()]
        cut = {name: tensor[:, :asked] for name in example if (tensor := example[name]).shape[:2] == ids.shape}
        device, whole = compute_device(model), {name: example[name] for name in example}
        inputs.append({name: tensor.to(device) for name, tensor in {**whole, **cut}.items() if name != "labels"})
        given.append(shortened(str(tokenizer.decode(ids[0, :asked], skip_special_tokens=True)), end=True))
        expected.append(shortened(str(tokenizer.decode(first_answer, skip_special_tokens=True))))
    return Texts(model, tokenizer, inputs, given, expected)


def _prompt(window: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first `PROMPT` tokens of a sentence of a window, int64 (`PROMPT`,), after its first token if all begin so."""
    begun = int(len(window) > 0 and int(window[0]) == tokenizer.bos_token_id)
    size = PROMPT - begun
    if len(window) < PROMPT + 1:
        raise NotShown(f"the windows of text have fewer than {PROMPT + 1} tokens")
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(window.tolist())]
    special = {*tokenizer.all_special_tokens}
    starts = range(begun, len(tokens) - size)
    plain = [start for start in starts if special.isdisjoint(tokens[start : start + size])]
    whole = [start for start in plain if tokens[start + size].startswith(WORD_STARTS)]
    ended = [start for start in whole if start > begun and tokens[start - 1].endswith((*SENTENCE_ENDS, *special))]
    sentences = [start for start in ended if tokens[start].lstrip("".join(WORD_STARTS))[:1].isupper()]
    start = next(iter([*sentences, *ended, *whole, *plain, *starts]))
    return torch.cat([window[:begun], window[start : start + size]])


class Words(Showing):
    """The likeliest token in the place of a masked one of each of several windows of text, int64 (windows, tokens)."""

    kind = "words"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, count: int) -> None:
        mask = tokenizer.mask_token_id
        if mask is None:
            raise NotShown("the tokenizer has no token that stands for a masked one")
        places = spread(len(windows), count)
        middle = windows.shape[1] // 2
        start, end = max(0, middle - CONTEXT), min(windows.shape[1], middle + CONTEXT + 1)
        self.model, self.tokenizer, self.place = model, tokenizer, middle - start
        cut = windows[places, start:end].clone()
        expected = [self._word(ids) for ids in cut[:, self.place]]
        cut[:, self.place] = mask
        given = [shortened(" ".join(str(tokenizer.decode(part)) for part in (ids[: self.place], ids[self.place :])))
                 for ids in cut]  # fmt: skip
        super().__init__(given, f"The likeliest token in the place of {tokenizer.mask_token}.", expected)
        self.ids = cut

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        device = compute_device(self.model)
        with frozen(self.model):
            logits: Tensor = run_model(self.model, Examples({"input_ids": self.ids}).to(device)).logits
        return [self._word(ids) for ids in logits[:, self.place].argmax(-1)]

    def _word(self, token: Tensor) -> str:
        return str(self.tokenizer.decode([int(token)])).strip()


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
