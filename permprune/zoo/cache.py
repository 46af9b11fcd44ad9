"""The folder on this machine that keeps what was fetched and converted once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from permprune.errors import PermpruneError


def cache_root() -> Path:
    """`$PERMPRUNE_CACHE` where it is set, else the platform's cache folder for this user."""
    return Path(os.environ.get("PERMPRUNE_CACHE") or platformdirs.user_cache_dir("permprune"))


def cached(entry: str, build: Callable[[Path], None]) -> Path:
    """The folder `entry` of the cache; on first use `build(folder)` fills it.

    The folder is built under another name beside its place and moved there in one step, so that it is whole
    or absent. Of several processes that build at once the first to finish wins, and all of them get its
    folder. Raises `PermpruneError` when the cache cannot be written.
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
    """The error for an entry that is in the cache, but not as it was built."""
    return PermpruneError(f"the cache is damaged ({what}): remove {cache_root() / entry}, and it is fetched again")


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
