"""Images with class labels, and with texts: questions with their answers, or captions."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.items import Item, Labels, Medium, Selection, find_metadata
from permprune.data.sources import ANSWERS, LABEL_COLUMNS, PROMPTS, Row, columns_of, find_column
from permprune.errors import PermpruneError
from permprune.examples import Examples, Part
from permprune.models.forward import argument_names, find_config
from permprune.models.processors import Processor, encode_pair, image_processor_of, pair_processor_of

MODES = {1: "L", 4: "RGBA"}
"""PIL image modes by number of channels; RGB for other numbers."""

CAPTIONS = (*ANSWERS, "caption", "captions", "text", "sentence")
"""Columns of a table's answers about images; of a list of answers the first is used."""

DATA = (".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".zst")
"""Suffixes of a data set's files."""


def open_image(file: Path | BytesIO, name: str) -> Image.Image:
    """Read an image, rotated by its EXIF data. Raises `PermpruneError`, which names it `name`, if it is damaged."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PermpruneError(f"cannot read the image {name}: remove or repair it") from error


IMAGES = Medium(
    "images",
    suffixes=(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    columns=("image", "img"),
    decode=open_image,
)


def load_images(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection
) -> dict[str, Tensor]:
    """Load images, preprocessed by the model's processor. Raises `PermpruneError` as `Medium.items` and `Labels` do.

    Returns `pixel_values` (count, channels, height, width) and, if the model takes labels and the source has them,
    `labels` (count,).

    `source` is one of

    * a folder whose sub-folders are the classes, or with a table of files and labels (`METADATA`);
    * a `datasets` name as in `load_documents`.
    """
    maker = image_processor_of(processor)
    taken = argument_names(model)
    labels = Labels(model.config) if "labels" in taken else None
    items = IMAGES.items(source, selection)
    owner = find_config(model.config, "num_channels")
    mode = MODES.get(owner.num_channels if owner else 3, "RGB")
    made = [maker(images=[item.read().convert(mode)], return_tensors="pt") for item in items]
    tensors = {name: _stack([one[name] for one in made], items) for name in made[0] if name in taken}
    classes = [item.label(LABEL_COLUMNS, labels) for item in items]
    if labels and any(label is not None for label in classes):
        tensors["labels"] = labels.tensor(classes, [item.name for item in items])
    return tensors


def _stack(tensors: list[Tensor], items: list[Item]) -> Tensor:
    for tensor, item in zip(tensors, items, strict=True):
        if tensor.shape != tensors[0].shape:
            raise PermpruneError(
                f"preprocessing gives {item.name} the shape {tuple(tensor.shape[1:])}, but {items[0].name} "
                f"{tuple(tensors[0].shape[1:])}: set a size in the model's preprocessor_config.json, or give images of "
                "one size"
            )
    return torch.cat(tensors)


def has_images(source: str | Path | None, part: Part, *, hub: bool) -> bool:
    """Whether a source contains images: a folder of files, or with `hub` a data set with a column of them.

    Raises `PermpruneError` if a data set does not load, or with `hub` if a source has images that are not read.
    """
    if source is None or _are_files(Path(source)):
        return source is not None
    columns = columns_of(str(source), part) if hub else {}
    if not Path(source).is_file() and not columns.keys().isdisjoint(IMAGES.columns):
        return True
    if unread := next((name for name in (*IMAGES.columns, "images") if name in columns), None):
        raise PermpruneError(
            f'{source} has images in its column "{unread}" that cannot be read: give a folder of the files with a '
            'metadata.jsonl, or the folder of a data set with a column "image"'
        )
    return False


def _are_files(path: Path) -> bool:
    """Whether a path is a folder of image files.

    A folder with data files and no table of images is a data set, whose images are pictures in its description.
    """
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower() for file in path.rglob("*")}
    described = find_metadata(path) is not None
    return not suffixes.isdisjoint(IMAGES.suffixes) and (described or suffixes.isdisjoint(DATA))


def load_pairs(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection
) -> Examples:
    """Load images with texts, as inputs of a vision-language model.

    The examples have the tensors of the model's processor that the model takes, and "labels": the tokens of the
    answers, and -100 for the prompts, the images and padding. Texts are not cut, as they contain a place for each part
    of the image.

    `source` is one of

    * a folder of image files with a table (`METADATA`) that has one of the columns `CAPTIONS`, and one of `PROMPTS` if
      the texts are more than captions;
    * a `datasets` name as in `load_documents`, with a column of images and the same columns of text.

    If the parts share files, all questions about one image are in the same half; rows of a data set are not compared.
    """
    maker, taken = pair_processor_of(processor), {*argument_names(model), "labels"}
    return Examples.join([_encoded(item, maker, taken) for item in IMAGES.items(source, selection)])


def _encoded(item: Item, processor: Any, taken: set[str]) -> Examples:
    pair = _pair(item.row, item.name)
    image: Image.Image = item.read().convert("RGB")
    try:
        tensors = encode_pair(processor, image, *pair)
    except PermpruneError as error:
        raise PermpruneError(f"{item.name}: {error}") from error
    return Examples({name: tensor for name, tensor in tensors.items() if name in taken})


def _pair(row: Row, place: str) -> tuple[str, str]:
    """The prompt, empty for captions, and the answer of a row. Raises `PermpruneError` if one is missing or empty."""
    prompt = next((column for column in PROMPTS if column in row), None)
    texts = []
    for column in [*([prompt] if prompt else []), find_column(row, CAPTIONS, place)]:
        text = row[column]
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise PermpruneError(f"{place} has no text in its column {column}: write it, or remove the row")
        texts.append(text)
    return ("", *texts)[-2], texts[-1]
