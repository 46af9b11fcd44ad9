"""Data as a model's inputs: text in windows, and text, images and speech with what a model should say of them."""

from permprune.data.audio import load_speech
from permprune.data.images import load_images
from permprune.data.labelled import load_labelled_text, read_labelled_text
from permprune.data.load import TOGETHER, WORTH, kind_of, load_examples
from permprune.data.overlap import overlap, warn_of_overlap
from permprune.data.text import load_documents, tokenize

__all__ = [
    "TOGETHER",
    "WORTH",
    "kind_of",
    "load_documents",
    "load_examples",
    "load_images",
    "load_labelled_text",
    "load_speech",
    "overlap",
    "read_labelled_text",
    "tokenize",
    "warn_of_overlap",
]
