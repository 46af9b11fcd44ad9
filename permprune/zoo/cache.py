"""The local cache of downloaded and converted models and data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from permprune.errors import PermpruneError


def cache_root() -> Path:
    """The cache folder: `$PERMPRUNE_CACHE` if it is set, else the platform's user cache folder."""
    return Path(os.environ.get("PERMPRUNE_CACHE") or platformdirs.user_cache_dir("permprune"))


def cached(entry: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `entry` of the cache; on first use, it is created by `build(folder)`.

    The folder is built under a temporary name and renamed when it is complete, so it is never partially filled. If
    several processes build it at once, the first to finish provides the folder for all of them. Raises `PermpruneError`
    if the cache cannot be written.
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
            _move(folder, target)
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


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
