"""Images with texts: questions about images with their answers, or captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from permprune.data.images import IMAGES
from permprune.data.items import FILE_COLUMNS, Item, Selection, find_list, listed_files
from permprune.data.sources import TABLES, dataset, find_column, first_row, looks_like_path, parse_name, read_text
from permprune.errors import PermpruneError
from permprune.examples import Examples, Part
from permprune.models.forward import argument_names
from permprune.models.pairs import encode_pair, pair_processor_of
from permprune.models.processors import Processor

PROMPTS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "answers", "response", "completion", "output", "caption", "captions", "text", "sentence")
"""Columns of a table's prompts, which may be missing, and of its answers; of a list of answers the first is used."""

DATA = (".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".zst")
"""Suffixes of a data set's files."""

Pair = tuple[str, str]
"""A prompt, empty for captions, and its answer."""


def has_images(source: str | Path | None, part: Part, *, hub: bool) -> bool:
    """Whether a source contains images: files in a folder, or a column of a table, or with `hub` of a data set.

    Raises `PermpruneError` if a data set does not load.
    """
    if source is None or _images_here(Path(source)):
        return source is not None
    name, _, _ = parse_name(str(source), part)
    if not hub or Path(name).is_file() or (looks_like_path(name) and not Path(name).is_dir()):
        return False
    with dataset(str(source), part) as rows:
        return bool(set(IMAGES.columns).intersection(rows.features or next(iter(rows), {})))


def _images_here(path: Path) -> bool:
    """Whether a path is a folder of image files or a table that lists some.

    A folder with data files and no table of images is a data set, whose images are pictures in its description.
    """
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        listed = find_list(path) is not None
        return not suffixes.isdisjoint(IMAGES.suffixes) and (listed or suffixes.isdisjoint(DATA))
    row = first_row(path) if path.is_file() and path.suffix in TABLES else {}
    return any(Path(str(row.get(column))).suffix.lower() in IMAGES.suffixes for column in FILE_COLUMNS)


def load_pairs(
    source: str | Path, model: PreTrainedModel, processor: Processor | None, selection: Selection
) -> Examples:
    """Load images with texts, as inputs of a vision-language model.

    The examples have the tensors of the model's processor that the model takes, and "labels": the tokens of the
    answers, and -100 for the prompts, the images and padding. Texts are not cut, as they contain a place for each part
    of the image.

    `source` is one of

    * a table (.csv, .tsv or .jsonl) of image files, relative to its folder, with one of the columns `ANSWERS`, and one
      of `PROMPTS` if the texts are more than captions;
    * a folder with such a table, named metadata or labels, or of images with a caption in a .txt file of the same name;
    * a `datasets` name as in `load_documents`, with a column of images and the same columns of text.

    If the parts share a source, all questions about one image are in the same half. Raises `PermpruneError` if the
    source cannot be read, a text is missing, or the model's processor fails.
    """
    maker, taken = pair_processor_of(processor), {*argument_names(model), "labels"}
    if _images_here(Path(source)):
        items = selection.files(_from_files(Path(source)), Path(source))
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


def _from_files(path: Path) -> list[Item]:
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
    columns = [*([prompt] if prompt else []), find_column(row, ANSWERS, place)]
    texts = []
    for column in columns:
        text = row[column]
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise PermpruneError(f"{place} has no text in its column {column}: write it, or remove the row")
        texts.append(text)
    return ("", *texts)[-2], texts[-1]
