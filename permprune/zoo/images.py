"""The test images of CIFAR-10, split into three disjoint parts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from permprune.system.progress import log
from permprune.zoo.packages import Package, cached, damaged, fetch

ImagePart = Literal["probe", "calibration", "evaluation"]

BIGBENCH = Package(
    name="bigbench",
    version="1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    size=358,
    license="Apache-2.0",
    source=True,
)
"""BIG-bench (Srivastava et al. 2022), which contains the 10,000 test images of CIFAR-10 (Krizhevsky 2009).

The package is licensed under Apache-2.0; CIFAR-10 states no license. The images are downloaded, never redistributed.
"""

ENTRY = "images/cifar10-1"
"""Name of the cache entry with the images."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SHARES: dict[ImagePart, int] = {"probe": 4, "calibration": 2, "evaluation": 4}
"""Tenths of the images in each part: for training a linear probe, for calibration, and for evaluation."""


@dataclass(frozen=True)
class Images:
    """Images: `pixels` are uint8 RGB (images, 32, 32, 3); `labels` are int64 (images,), indices into `CLASSES`."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def load_images(part: ImagePart) -> Images:
    """Load one part of the images, in a fixed shuffled order; downloaded on first use.

    Raises `PermpruneError` if the download fails, or if the cache is damaged or cannot be written.
    """
    folder = cached(ENTRY, _build)
    try:
        with (folder / f"{part}.npz").open("rb") as stored, np.load(stored) as file:
            return Images(file["pixels"], file["labels"])
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(ENTRY, error) from error


def split(images: Images) -> dict[ImagePart, Images]:
    """Split images by the digest of their pixels, so that equal images are in the same part; sorted by digest."""
    digests = [hashlib.sha256(pixels.tobytes()).digest() for pixels in images.pixels]
    tenths = np.array([int.from_bytes(digest) % sum(SHARES.values()) for digest in digests])
    order = np.array(sorted(range(len(digests)), key=digests.__getitem__))
    parts: dict[ImagePart, Images] = {}
    first = 0
    for part, share in SHARES.items():
        chosen = order[(tenths[order] >= first) & (tenths[order] < first + share)]
        parts[part] = Images(images.pixels[chosen], images.labels[chosen])
        first += share
    return parts


def read_task(file: Path) -> Images:
    """Read the images of a BIG-bench task file whose inputs are base64-encoded PNG files."""
    examples: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["examples"]
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(example["input"])))) for example in examples]
    labels = [[example["target_scores"][name] for name in CLASSES].index(1) for example in examples]
    return Images(np.stack(pixels), np.array(labels, dtype=np.int64))


def _build(folder: Path) -> None:
    member = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
    (file,) = fetch(BIGBENCH, [member], folder.parent)
    log.info("decoding the images")
    for part, chosen in split(read_task(file)).items():
        np.savez_compressed(folder / f"{part}.npz", pixels=chosen.pixels, labels=chosen.labels)
