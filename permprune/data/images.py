"""Images with class labels, and with texts: questions with their answers, or captions."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.items import FILE_COLUMNS, Item, Labels, Medium, Selection, find_list, listed_files
from permprune.data.sources import (
    ANSWERS,
    LABEL_COLUMNS,
    PROMPTS,
    TABLES,
    columns_of,
    find_column,
    first_row,
    read_text,
)
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

Pair = tuple[str, str]
"""A prompt, empty for captions, and its answer."""


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
    """Load images, preprocessed by the model's processor.

    Returns `pixel_values` (count, channels, height, width) and, if the model takes labels and the source has them,
    `labels` (count,).

    `source` is one of

    * a folder whose sub-folders are the classes, or with a table that lists files and labels, named labels or metadata
      with suffix .csv, .tsv or .jsonl;
    * such a table;
    * a `datasets` name as in `load_documents`.

    Raises `PermpruneError` if the source cannot be read, a label is unknown to the model, or the preprocessed images
    differ in size.
    """
    maker = image_processor_of(processor)
    taken = argument_names(model)
    labels = Labels(model.config) if "labels" in taken else None
    items = IMAGES.labelled(source, selection, LABEL_COLUMNS, labels)
    owner = find_config(model.config, "num_channels")
    mode = MODES.get(owner.num_channels if owner else 3, "RGB")
    made = [maker(images=[item.read().convert(mode)], return_tensors="pt") for item in items]
    tensors = {name: _stack([one[name] for one in made], items) for name in made[0] if name in taken}
    if labels and any(item.label is not None for item in items):
        tensors["labels"] = labels.tensor([item.label for item in items], [item.name for item in items])
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
    """Whether a source contains images: files in a folder, or a column of a table, or with `hub` of a data set.

    Raises `PermpruneError` if a data set does not load, or with `hub` if a source has images that are not read.
    """
    if source is None or _images_here(Path(source)):
        return source is not None
    columns = columns_of(str(source), part) if hub else {}
    if not Path(source).is_file() and not columns.keys().isdisjoint(IMAGES.columns):
        return True
    if unread := next((name for name in (*IMAGES.columns, "images") if name in columns), None):
        raise PermpruneError(
            f'{source} has images in its column "{unread}" that cannot be read: name their files in a column '
            '"file_name" of a table, or give the folder of a data set with a column "image"'
        )
    return False


def _images_here(path: Path) -> bool:
    """Whether a path is a folder of image files or a table that lists some.

    A folder with data files and no table of images is a data set, whose images are pictures in its description.
    """
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        listed = find_list(path) is not None
        return not suffixes.isdisjoint(IMAGES.suffixes) and (listed or suffixes.isdisjoint(DATA))
    row = first_row(path) if path.is_file() and path.suffix.lower() in TABLES else {}
    return any(Path(str(row.get(column))).suffix.lower() in IMAGES.suffixes for column in FILE_COLUMNS)


def load_pairs(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection
) -> Examples:
    """Load images with texts, as inputs of a vision-language model.

    The examples have the tensors of the model's processor that the model takes, and "labels": the tokens of the
    answers, and -100 for the prompts, the images and padding. Texts are not cut, as they contain a place for each part
    of the image.

    `source` is one of

    * a table (.csv, .tsv or .jsonl) of image files, relative to its folder, with one of the columns `CAPTIONS`, and one
      of `PROMPTS` if the texts are more than captions;
    * a folder with such a table, named metadata or labels, or of images with a caption in a .txt file of the same name;
    * a `datasets` name as in `load_documents`, with a column of images and the same columns of text.

    If the parts share files, all questions about one image are in the same half; rows of a data set are not compared.
    Raises `PermpruneError` if the source cannot be read, a text is missing, or the model's processor fails.
    """
    maker, taken = pair_processor_of(processor), {*argument_names(model), "labels"}
    if _images_here(Path(source)):
        items = selection.files(_pairs_of_files(Path(source)), Path(source))
    else:
        items = IMAGES.rows(str(source), selection, lambda row, place, _: _pair(row, place))
    return Examples.join([_encoded(item, maker, taken) for item in items])


def _encoded(item: Item, processor: Any, taken: set[str]) -> Examples:
    image: Image.Image = item.read().convert("RGB")
    try:
        tensors = encode_pair(processor, image, *item.label)
    except PermpruneError as error:
        raise PermpruneError(f"{item.name}: {error}") from error
    return Examples({name: tensor for name, tensor in tensors.items() if name in taken})


def _pairs_of_files(path: Path) -> list[Item]:
    if table := find_list(path):
        rows = enumerate(listed_files(table), 1)
        return [IMAGES.item(file, _pair(row, f"{table}, row {number}")) for number, (file, row) in rows]
    items = []
    for file in IMAGES.files(path):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise PermpruneError(
                f"{file} has no text: write it into {caption.name} beside it, or into a metadata.jsonl"
            )
        items.append(IMAGES.item(file, _pair({"text": read_text(caption).strip()}, str(caption))))
    return items


def _pair(row: Mapping[str, Any], place: str) -> Pair:
    """The prompt and the answer of a row. Raises `PermpruneError` if one is missing or empty."""
    prompt = next((column for column in PROMPTS if column in row), None)
    columns = [*([prompt] if prompt else []), find_column(row, CAPTIONS, place)]
    texts = []
    for column in columns:
        text = row[column]
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise PermpruneError(f"{place} has no text in its column {column}: write it, or remove the row")
        texts.append(text)
    return ("", *texts)[-2], texts[-1]
