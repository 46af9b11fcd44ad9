"""Processors (tokenizers, image processors, feature extractors), loaded from the folder of a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from permprune.errors import PermpruneError

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
