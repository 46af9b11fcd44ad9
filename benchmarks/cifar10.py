"""The 10,000 test images of CIFAR-10 (Krizhevsky 2009), split into three disjoint parts, as folders of PNG files.

python benchmarks/cifar10.py --out .

Writes train/ to fit classifiers on, photos/ to calibrate on and other/ to measure on, each with a sub-folder for each
class. The images come out of the source package of BIG-bench (Srivastava et al. 2022), 358 MB, which is licensed under
Apache-2.0; CIFAR-10 itself states no license. They are downloaded, never redistributed.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import urljoin
from urllib.request import urlopen

from PIL import Image

from permprune.zoo.packages import cached

INDEX = "https://pypi.org/simple/bigbench/"
ARCHIVE = "bigbench-1.0.0.tar.gz"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASK = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

TENTHS = {"train": 4, "photos": 2, "other": 4}
"""Tenths of the images in each part."""

Labelled = tuple[bytes, str]
"""The contents of a PNG file of 32 x 32 pixels, and the name of its class."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    write(parser.parse_args().out)


def write(out: Path) -> None:
    """Write the folders train/, photos/ and other/; those that exist are left as they are."""
    for name in TENTHS:
        if not (out / name).exists():
            for number, (png, label) in enumerate(images(name)):
                file = out / name / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png)


def images(part: str) -> list[Labelled]:
    """The images of a part, in a fixed shuffled order: that of the digests of their pixels, which also decide the part.

    Equal images are in the same part. The package is downloaded on first use.
    """
    task = cached("images/cifar10-2", download) / "task.json"
    examples: list[dict[str, Any]] = json.loads(task.read_text(encoding="utf-8"))["examples"]
    found = []
    for example in examples:
        png = base64.b64decode(example["input"])
        digest = hashlib.sha256(Image.open(io.BytesIO(png)).tobytes()).digest()
        label = next(name for name in CLASSES if example["target_scores"][name] == 1)
        found.append((digest, png, label))
    own = [name for name, tenths in TENTHS.items() for _ in range(tenths)]
    return [(png, label) for digest, png, label in sorted(found) if own[int.from_bytes(digest) % len(own)] == part]


def download(folder: Path) -> None:
    """Write task.json, out of the archive on the registry, to a folder."""
    with urlopen(INDEX) as page:
        link = next(one for one in re.findall(r'href="([^"]+)"', page.read().decode()) if f"/{ARCHIVE}" in one)
    with urlopen(urljoin(INDEX, link)) as reply:
        archive = reply.read()
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise SystemExit(f"{ARCHIVE} is not the expected file: its SHA-256 is not {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        task = opened.extractfile(TASK)
        assert task is not None
        (folder / "task.json").write_bytes(task.read())


if __name__ == "__main__":
    main()
