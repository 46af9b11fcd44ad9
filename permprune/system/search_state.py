"""Saved states, from which interrupted searches are resumed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system import distributed
from permprune.system.digests import digest_of
from permprune.system.files import write_whole

EVERY = 30.0
"""Seconds between two saves of a journal."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and values that JSON can hold."""


class Checkpoint:
    """Saves the states of searches in `folder`, one file each; if it is None, nothing is saved.

    `settings` are what the searches depend on. A state with other settings is refused, because resuming from it would
    give the result of neither run.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def save(
        self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any], every_rank: bool = False
    ) -> None:
        """Save a state in place of the previous one of that name, on the first rank or on `every_rank`.

        Raises `PermpruneError` if it cannot be written.
        """
        if self.folder is None or (distributed.rank() and not every_rank):
            return
        copies = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {
            "settings": json.dumps(self.settings),
            "values": json.dumps(values),
            "digest": digest_of(sorted(copies.items())),
        }
        write_whole(self.folder / f"{name}.safetensors", lambda temporary: save_file(copies, temporary, metadata))

    def load(self, name: str) -> State | None:
        """Return the tensors and values that were saved last, or None.

        Raises `PermpruneError` for a state with other settings, naming those that differ, and for a damaged file.
        """
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            saved, values, digest = (metadata[key] for key in ("settings", "values", "digest"))
            settings, found = json.loads(saved), json.loads(values)
            if digest != digest_of(sorted(tensors.items())):
                raise ValueError("the digest differs")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PermpruneError(f"{path} is damaged: remove it, and --resume computes it again") from error
        require_same(path, settings, self.settings)
        return tensors, found

    def names(self, prefix: str) -> list[str]:
        """Return the names of the saved states that start with `prefix`."""
        return [] if self.folder is None else sorted(path.stem for path in self.folder.glob(f"{prefix}*.safetensors"))


class Journal:
    """The partial results of a search: saved every `EVERY` seconds and at the end, and loaded when it is resumed.

    `tensors` and `values` are the results by name. Each rank writes its own file and reads the files of all ranks. Used
    as a context manager around the search; `add` may be called by several threads.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, f"{name}.rank-{distributed.rank()}"
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self._own: State = ({}, {})
        self._before = 0.0
        for file in checkpoint.names(f"{name}.rank-"):
            tensors, values = checkpoint.load(file) or ({}, {"pieces": {}, "seconds": 0.0})
            self.tensors |= tensors
            self.values |= values["pieces"]
            if file == self.name:
                self._own, self._before = (tensors, values["pieces"]), values["seconds"]
        self._started = self._saved = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds of this search so far, including those of interrupted runs."""
        return self._before + time.monotonic() - self._started

    def add(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
        """Add results. Raises `PermpruneError` if they cannot be written."""
        with self._lock:
            for kept_tensors, kept_values in ((self.tensors, self.values), self._own):
                kept_tensors.update(tensors)
                kept_values.update(values or {})
            if time.monotonic() - self._saved >= EVERY:
                self._save()

    def _save(self) -> None:
        tensors, pieces = self._own
        self.checkpoint.save(self.name, tensors, {"pieces": pieces, "seconds": self.seconds}, every_rank=True)
        self._saved = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(self._own):
            self._save()


def require_same(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` if the settings saved at `path` differ from `own`, naming those that do."""
    if other := sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key)):
        raise PermpruneError(
            f"{path} was saved with another {', '.join(other)}: use the same, or remove {path.parent} and start again"
        )
