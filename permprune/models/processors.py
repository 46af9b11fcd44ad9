"""What turns text, images and sound into a model's inputs, as it lies beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

TEXT_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")
OTHER_FILES = ("*processor_config.json",)


def read_processor(source: str | Path, trust_remote_code: bool = False) -> Processor | None:
    """The tokenizer, image processor or feature extractor of a folder or hub id, or the processor that joins them.

    None for a folder that has none of their files: Transformers would make up an empty tokenizer. Code that comes with
    one is run only with `trust_remote_code`. Raises what Transformers raises when there is one that does not load, or
    that takes no text.
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
        except Exception as error:  # a wrong kind raises whatever its reader meets first
            failures.append(error)
        else:
            return processor
    if failures:
        raise failures[0]
    return None


def _try_text(processor: Processor) -> None:
    """Let a tokenizer read a letter: some damage to its files shows only then."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer("a")


def tokenizer_of(processor: Processor | None) -> PreTrainedTokenizerBase:
    """The tokenizer that a processor is or has. Raises `PermpruneError` where there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise PermpruneError("text needs a tokenizer, and the model has none: save one into its folder")
    return tokenizer


def image_processor_of(processor: Processor | None) -> BaseImageProcessor:
    """The image processor that a processor is or has. Raises `PermpruneError` where there is none."""
    found = getattr(processor, "image_processor", processor)
    if not isinstance(found, BaseImageProcessor):
        raise PermpruneError("images need an image processor, and the model has none: save one into its folder")
    return found


def feature_extractor_of(processor: Processor | None) -> FeatureExtractionMixin:
    """The feature extractor that a processor is or has. Raises `PermpruneError` where there is none."""
    found = getattr(processor, "feature_extractor", processor)
    if not isinstance(found, FeatureExtractionMixin):
        raise PermpruneError("sound needs a feature extractor, and the model has none: save one into its folder")
    return found
