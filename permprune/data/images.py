"""Images with class labels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel

from permprune.data.items import Item, Labels, Medium, Selection, class_of, find_list, row_label
from permprune.data.sources import LABEL_COLUMNS, locate
from permprune.errors import PermpruneError
from permprune.models.forward import argument_names, find_config
from permprune.models.processors import Processor, image_processor_of

MODES = {1: "L", 4: "RGBA"}
"""PIL image modes by number of channels; RGB for other numbers."""


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
    path = locate(source, "images")
    if path is None:
        items = IMAGES.rows(str(source), selection, lambda row, _, names: row_label(row, LABEL_COLUMNS, names, labels))
    else:
        items = selection.files(_from_files(path), path)
    owner = find_config(model.config, "num_channels")
    mode = MODES.get(owner.num_channels if owner else 3, "RGB")
    made = [maker(images=[item.read().convert(mode)], return_tensors="pt") for item in items]
    tensors = {name: _stack([one[name] for one in made], items) for name in made[0] if name in taken}
    if labels and any(item.label is not None for item in items):
        tensors["labels"] = labels.tensor([item.label for item in items], [item.name for item in items])
    return tensors


def _from_files(path: Path) -> list[Item]:
    if table := find_list(path):
        return IMAGES.listed(table, LABEL_COLUMNS)
    return [IMAGES.item(file, class_of(file, path)) for file in IMAGES.files(path)]


def _stack(tensors: list[Tensor], items: list[Item]) -> Tensor:
    for tensor, item in zip(tensors, items, strict=True):
        if tensor.shape != tensors[0].shape:
            raise PermpruneError(
                f"preprocessing gives {item.name} the shape {tuple(tensor.shape[1:])}, but {items[0].name} "
                f"{tuple(tensors[0].shape[1:])}: set a size in the model's preprocessor_config.json, or give images of "
                "one size"
            )
    return torch.cat(tensors)
