"""What models answer: classes or scores, nearest neighbours, and texts that they write.

Such texts are continuations of prompts, filled-in words, what is said of an image, and transcripts.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from permprune.evaluation.speech import transcribed
from permprune.examples import IGNORED, Examples
from permprune.losses.targets import embed_all
from permprune.models.forward import (
    argument_names,
    evaluating,
    frozen,
    is_encoder_decoder,
    run_model,
    typed_inputs,
    writes_text,
)
from permprune.models.modality import kind_of, pooling_of
from permprune.models.processors import Processor, image_processor_of, tokenizer_of
from permprune.showcase.base import NotShown, Showing, shortened, spread, text_of, thumbnail
from permprune.system.device import compute_device

STRIP = 4
"""Examples with a class are short: so many are shown in the place of one text."""

AMONG_TEXTS, AMONG_IMAGES = 256, 48
"""The most examples among which neighbours are sought."""

FEATURES = ("image_embeds", "pooler_output")
"""Outputs with the features of a whole image; of a model without them the mean over the positions is taken."""

BATCH = 16
"""Examples of a forward pass."""

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
    tokenizer = tokenizer_of(processor)
    if "labels" in examples:
        return answers(model, tokenizer, examples, count)
    if model.can_generate():
        return continuations(model, tokenizer, examples["input_ids"], count)
    if model.get_output_embeddings() is not None:
        return Words(model, tokenizer, examples["input_ids"], count)
    raise NotShown(f"a {type(model).__name__} has no head that gives an answer")


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
    """Beginnings of `count` windows of text, int64 (windows, tokens), with what a model writes for them.

    A language model continues a prompt, which begins with a sentence of the window and ends with a word, as far as the
    vocabulary tells.
    """
    places = spread(len(windows), count)
    if is_encoder_decoder(model):
        ids = windows[places, : 2 * PROMPT]
    else:
        ids = torch.stack([_prompt(windows[place], tokenizer) for place in places])
    given = [shortened(str(tokenizer.decode(prompt, skip_special_tokens=True))) for prompt in ids]
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
