"""Processors (tokenizers, image processors, feature extractors) of a folder, and inputs of images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from permprune.errors import PermpruneError, first_line
from permprune.examples import IGNORED
from permprune.models.forward import argument_names, is_causal_lm

Processor = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin

T = TypeVar("T")

TEXT_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")
OTHER_FILES = ("*processor_config.json",)


def read_processor(source: str | Path, trust_remote_code: bool = False) -> Processor | None:
    """Load the processor of a folder or hub id: a tokenizer, image processor, feature extractor, or a combined one.

    Returns None for a folder without processor files, for which Transformers would create an empty tokenizer. Custom
    code of a processor runs only with `trust_remote_code`. If a processor does not load, or its tokenizer fails on a
    simple text, the error from Transformers is raised.
    """
    folder = Path(source)
    kinds: list[Any] = [AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor]
    if folder.is_dir():
        text, other = (any(any(folder.glob(pattern)) for pattern in patterns) for patterns in (TEXT_FILES, OTHER_FILES))
        kinds = kinds[:1] if text and other else kinds[1:2] if text else kinds[2:] if other else []
    failures: list[Exception] = []
    for kind in kinds:
        try:
            processor: Processor = kind.from_pretrained(source, trust_remote_code=trust_remote_code)
            _try_text(processor)
        except Exception as error:  # a class that does not fit the files can raise any type of error
            failures.append(error)
        else:
            return processor
    if failures:
        raise failures[0]
    return None


def _try_text(processor: Processor) -> None:
    """Tokenize one letter, because some damage to a tokenizer's files only causes an error in use."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer("a")


def tokenizer_of(processor: Processor | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the processor itself if it is one. Raises `PermpruneError` if there is none."""
    return _part(processor, "tokenizer", PreTrainedTokenizerBase, "text needs a tokenizer")


def image_processor_of(processor: Processor | None) -> BaseImageProcessor:
    """The image processor of a processor, or the processor itself, as `tokenizer_of`."""
    return _part(processor, "image_processor", BaseImageProcessor, "images need an image processor")


def feature_extractor_of(processor: Processor | None) -> FeatureExtractionMixin:
    """The feature extractor of a processor, or the processor itself, as `tokenizer_of`."""
    return _part(processor, "feature_extractor", FeatureExtractionMixin, "sound needs a feature extractor")


def _part(processor: Processor | None, attribute: str, kind: type[T], needed: str) -> T:
    part = getattr(processor, attribute, processor)
    if not isinstance(part, kind):
        raise PermpruneError(f"{needed}, and the model has none: save one into its folder, or give one")
    return part


def takes_pairs(model: PreTrainedModel) -> bool:
    """Whether the model is a causal language model that reads images."""
    return is_causal_lm(model) and {"input_ids", "pixel_values"} <= set(argument_names(model))


def pair_processor_of(processor: Processor | None) -> Any:
    """The processor of images with texts. Raises `PermpruneError` if there is none."""
    parts = [getattr(processor, name, None) for name in ("tokenizer", "image_processor")]
    kinds = (PreTrainedTokenizerBase, BaseImageProcessor)
    if not isinstance(processor, ProcessorMixin) or not all(map(isinstance, parts, kinds)):
        raise PermpruneError(
            "images with texts need a processor of both, and the model has none: save its processor into its folder"
        )
    return processor


def encode_pair(processor: Any, image: Image, prompt: str, answer: str) -> dict[str, Tensor]:
    """Tokenize a prompt about an image and its answer, and preprocess the image, with a model's processor.

    Prompt and answer are two turns in the processor's chat template, or else lines after the image. Returns the
    processor's tensors, "input_ids" (1, tokens) among them, and "labels" (1, tokens): the answer's tokens, and -100
    before them. Raises `PermpruneError` if the template or the processor fails, or if the answer has no tokens.
    """
    user = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
    turns = [{"role": "user", "content": user}]
    ended = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    try:
        if processor.chat_template:
            asked = processor.apply_chat_template(turns, add_generation_prompt=True)
            text = processor.apply_chat_template(ended)
        else:
            asked = "\n".join([processor.image_token, *([prompt] if prompt else []), ""])
            text = asked + answer
        start = processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if start and text.startswith(start) else {}
        made = processor(text=[text], images=[[image]], return_tensors="pt", **special)
    except (jinja2.TemplateError, ValueError, TypeError, IndexError) as error:
        raise PermpruneError(f"the model's processor fails on an image with text: {first_line(error)}") from error
    tensors: dict[str, Tensor] = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    return {**tensors, "labels": _answer_labels(tensors["input_ids"], processor.tokenizer, asked, text)}


def shared_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the number of characters or tokens at the beginning that are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _answer_labels(ids: Tensor, tokenizer: PreTrainedTokenizerBase, asked: str, text: str) -> Tensor:
    """The tokens (1, tokens) of a text with -100 instead of those of `asked`, its beginning.

    All image tokens are at the beginning, so that the answer's tokens are counted from the end.
    """
    before, whole = (tokenizer(passage, add_special_tokens=False)["input_ids"] for passage in (asked, text))
    common = shared_start(before, whole)
    answer_ids = torch.tensor(whole[common:])
    ends = [len(whole) - common + extra for extra in (0, 1)]  # the tokenizer may add an end of text
    lengths = [
        size for size in ends if size and torch.equal(ids[0, len(ids[0]) - size :][: len(answer_ids)], answer_ids)
    ]
    if not len(answer_ids) or not lengths:
        raise PermpruneError("the model's processor gives an answer no tokens of its own: check its chat template")
    labels = ids.clone()
    labels[:, : -lengths[0]] = IGNORED
    return labels
