"""Files that are whole or absent, and the state from which an interrupted search goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permprune import parallel
from permprune.errors import PermpruneError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: readers see all of it or nothing.

    Raises `PermpruneError` when it cannot be written (a full disk, a missing permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PermpruneError(f"cannot write {path}: {reason}; free space or choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `out` and rename it: `out` is all there or absent. Raises `PermpruneError`."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        os.replace(partial, out)
    except OSError as error:
        raise PermpruneError(f"cannot write {out}: {error.strerror or error}; free space, then try again") from error


def require_free(out: Path) -> None:
    if out.exists():
        raise PermpruneError(f"{out} exists already: remove it, or choose another --out")
    if not out.absolute().parent.exists():
        raise PermpruneError(f"there is no folder {out.absolute().parent} to write into: create it")


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, infinities and NaN as null. Raises `PermpruneError`."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _finite(value: object) -> object:
    """The same with infinities and NaN as None, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Checkpoint:
    """The states of searches, one file each in `folder`; None as folder keeps nothing.

    `settings` are what the searches depend on: a state saved under others is refused, since going on from it would give
    neither run's result.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        if self.folder is None or parallel.rank():
            return
        metadata = {"settings": json.dumps(self.settings), "values": json.dumps(values)}
        copies = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_whole(self.folder / f"{name}.safetensors", lambda temporary: save_file(copies, temporary, metadata))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and values saved last, or None. Raises `PermpruneError` for a state of other settings."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise PermpruneError(f"{path} is damaged: remove it and start anew") from error
        saved = json.loads(metadata["settings"])
        if saved != self.settings:
            other = sorted(k for k in saved.keys() | self.settings.keys() if saved.get(k) != self.settings.get(k))
            raise PermpruneError(
                f"{path} was saved with other settings ({', '.join(other)}): repeat those, or run without --resume"
            )
        return tensors, json.loads(metadata["values"])
