"""Load examples of the kind that a model takes: text, images with texts, labelled texts, images or speech."""

from __future__ import annotations

from transformers import PreTrainedModel

from permprune.data.answers import has_answers, load_answers
from permprune.data.audio import load_speech
from permprune.data.images import has_images, load_images, load_pairs
from permprune.data.items import Selection
from permprune.data.labelled import load_labelled_text, load_sentences
from permprune.data.text import load_documents, tokenize
from permprune.errors import PermpruneError
from permprune.examples import Examples, Part
from permprune.models.modality import clipped_length, kind_of
from permprune.models.processors import Processor, takes_pairs, tokenizer_of


def load_examples(
    source: str | None,
    model: PreTrainedModel,
    processor: Processor | None,
    *,
    part: Part,
    count: int,
    length: int = 512,
    seed: int | None = None,
    shared: bool = False,
    apart: int = 0,
) -> Examples:
    """Load up to `count` examples as inputs of the model, with labels if both the source and the model have them.

    `source` is a source of `load_documents`, `load_labelled_text`, `load_sentences`, `load_images` or `load_speech`,
    depending on `kind_of(model)`, or of `load_pairs` for a vision-language model if it contains images, or of
    `load_answers` if it has answers; None is the default text. Text is cut into windows of `length` tokens, the first
    ones, or with a `seed` random ones (see `tokenize` for `apart`); other examples are always chosen at random. With
    `shared`, the calibration and the evaluation part come from the same source. Raises `PermpruneError` if the source
    cannot be read or does not fit the model.
    """
    kind = kind_of(model)
    selection = Selection(part, count, seed or 0, shared)
    if kind == "text" and has_images(source, part, hub=takes_pairs(model)):
        if not takes_pairs(model):
            raise PermpruneError(f"{source} holds images, and {type(model).__name__} takes none: give text alone")
        return _known(model, load_pairs(str(source), model, processor, selection))
    if kind == "text" and has_answers(source, part):
        return _known(model, load_answers(str(source), model, processor, selection, clipped_length(model, length)))
    if kind == "text":
        documents, length = load_documents(source, part), clipped_length(model, length)
        windows = tokenize(documents, tokenizer_of(processor), length, count, seed, apart=apart)
        return _known(model, Examples.of(windows))
    length = clipped_length(model, length) if source or kind == "embeddings" else length
    if kind == "embeddings":
        return _known(model, Examples(load_sentences(source, model, processor, selection, length)))
    if source is None:
        use = "calibrate" if part == "calibration" else "evaluate"
        raise PermpruneError(f"there is no default data of {kind} to {use} on: name a file, a folder or a data set")
    if kind == "images":
        return Examples(load_images(source, model, processor, selection))
    if kind == "speech":
        return Examples(load_speech(source, model, processor, selection))
    return _known(model, Examples(load_labelled_text(source, model, processor, selection, length)))


def _known(model: PreTrainedModel, texts: Examples) -> Examples:
    """Return the texts unchanged. Raises `PermpruneError` if a token is outside the model's embedding."""
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # raised by model classes that do not define their input embeddings
        return texts
    largest = int(texts["input_ids"].max())
    if known is not None and largest >= known:
        raise PermpruneError(
            f"the tokenizer gives token {largest}, but the model has {known} tokens: take both from one checkpoint"
        )
    return texts
