"""Saved states, from which interrupted searches, trainings and comparisons are resumed."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from safetensors import SafetensorError
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system import distributed
from permprune.system.digests import digest_of
from permprune.system.files import write_whole
from permprune.system.shelf import Computed, Shelf, read_tensors, write_tensors

EVERY, SLOW = 30.0, 1.6
"""Seconds between two saves of a stage; `SLOW` times as many if a save takes more than a twentieth of them."""

State = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Tensors by name, which may be read one at a time, and values that JSON can hold."""

T = TypeVar("T")


class Checkpoint:
    """Saves states in `folder`, such as those of searches, one file each; if it is None, nothing is saved.

    `settings` are what the states depend on. One with other settings is refused, because resuming from it would give
    the result of neither run.
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
        if self.folder is None or not self.saves(every_rank):
            return
        texts = {"settings": json.dumps(self.settings), "values": json.dumps(values)}
        metadata = {**texts, "digest": _digest(tensors, *texts.values())}
        write_whole(self.folder / f"{name}.safetensors", lambda temporary: write_tensors(temporary, tensors, metadata))

    def save_object(self, name: str, value: Any) -> None:
        """Save a dataclass object as it is (see `as_state`), on the first rank; otherwise as `save`."""
        if self.saves():
            self.save(name, *as_state(value))

    def load_object(self, name: str, kind: type[T]) -> T | None:
        """Return the object of the dataclass `kind` that was saved last, or None; raises `PermpruneError` as `load`."""
        state = self.load(name)
        try:
            return None if state is None else from_state(kind, state)
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(name) from error

    def saves(self, every_rank: bool = False) -> bool:
        """Return whether this rank saves states."""
        return self.folder is not None and (every_rank or not distributed.rank())

    def remove(self, name: str) -> None:
        """Remove a state, if there is one; the first rank does so for all."""
        if self.folder is not None and not distributed.rank():
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def load(self, name: str) -> State | None:
        """Return the tensors and values that were saved last, or None; tensors are read when they are accessed.

        Raises `PermpruneError` for a state with other settings, naming those that differ, and for a damaged file.
        """
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
            saved, values, digest = (metadata[key] for key in ("settings", "values", "digest"))
            settings, loaded = json.loads(saved), json.loads(values)
            if digest != _digest(tensors, saved, values):
                raise ValueError("the digest differs")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(name) from error
        require_same(path, settings, self.settings)
        return tensors, loaded

    def names(self, prefix: str) -> list[str]:
        """Return the names of the saved states that start with `prefix`."""
        return [] if self.folder is None else sorted(path.stem for path in self.folder.glob(f"{prefix}*.safetensors"))

    def _damaged(self, name: str) -> PermpruneError:
        return PermpruneError(f"{self.folder}/{name}.safetensors is damaged: remove it, and --resume computes it again")


class Resumable:
    """A stage of a run that saves its state every `EVERY` seconds, so that it can be resumed.

    A state that an interrupted run saved under the same name and `key` is loaded, with the seconds `before` that the
    stage had taken; one with another key is that of an earlier stage. With `every_rank` each rank saves its own state,
    otherwise only the first one does.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, key: Any = None, *, every_rank: bool = False) -> None:
        self.checkpoint, self.name, self.key, self.every_rank = checkpoint, name, key, every_rank
        self._loaded: State | None = None
        self.before, self._slow = 0.0, False
        saved = checkpoint.load(name)
        if saved is not None and saved[1]["key"] == key:
            self._loaded, self.before = (saved[0], saved[1]["own"]), saved[1]["seconds"]
        self._started = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of this stage so far, including those of interrupted runs."""
        return self.before + time.monotonic() - self._started

    def take(self) -> State | None:
        """Return the state that was loaded, or None; a second call returns None, so that it is freed."""
        state, self._loaded = self._loaded, None
        return state

    def offer(self, state: Callable[[], State]) -> None:
        """Save the state that `state` returns, if it is time to. Raises `PermpruneError` if it cannot be written."""
        if time.monotonic() - self._saved >= EVERY * (SLOW if self._slow else 1):
            self.save(state)

    def save(self, state: Callable[[], State]) -> None:
        """Save the state that `state` returns. Raises `PermpruneError` if it cannot be written."""
        if self.checkpoint.saves(self.every_rank):
            began = time.monotonic()
            tensors, values = state()
            values = {"key": self.key, "seconds": self.seconds, "own": values}
            self.checkpoint.save(self.name, tensors, values, self.every_rank)
            self._saved = time.monotonic()
            self._slow = self._saved - began > EVERY / 20


class Journal(Resumable):
    """The partial results of a search, which are saved at its end as well.

    `tensors` are the results by name. Each rank writes its own file and reads the files of all ranks. Used as a context
    manager around the search; `add` may be called by several threads.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        super().__init__(checkpoint, f"{name}.rank-{distributed.rank()}", every_rank=True)
        tensors, _ = self.take() or ({}, {})
        self._of_rank = dict(tensors)
        self.tensors = dict(self._of_rank)
        for file in checkpoint.names(f"{name}.rank-"):
            if file != self.name and (saved := checkpoint.load(file)):
                self.tensors |= saved[0]
        self._lock = threading.Lock()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add results. Raises `PermpruneError` if they cannot be written."""
        with self._lock:
            self.tensors |= tensors
            self._of_rank |= tensors
            self.offer(lambda: (self._of_rank, {}))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._of_rank:
            self.save(lambda: (self._of_rank, {}))


def as_state(value: Any) -> State:
    """Return a dataclass object as a state: its tensors, by their paths in the object, and its other values.

    It may have other dataclass objects, mappings with keys that are strings, lists and tuples, and in them tensors and
    values that JSON can hold. Tensors on a shelf are read there when they are accessed.
    """
    tensors: dict[str, Callable[[], Tensor]] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = lambda: value
            return None
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name), f"{path}/{field.name}") for field in fields(value)}
        if isinstance(value, Shelf):
            tensors.update({f"{path}/{key}": partial(value.resting, key) for key in value})
            return dict.fromkeys(value)
        if isinstance(value, Mapping):
            return {key: plain(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{path}/{number}") for number, item in enumerate(value)]
        return value

    values = plain(value, "")
    return Computed(tensors, lambda path: tensors[path]()), values


def from_state(kind: type[T], state: State) -> T:
    """Return the object of the dataclass `kind` that `as_state` returned as `state`, by the hints of its fields."""
    tensors, values = state

    def restored(hint: Any, value: Any, path: str) -> Any:
        if path in tensors:
            return tensors[path]
        if isinstance(hint, type) and is_dataclass(hint):
            hints = get_type_hints(hint)
            return hint(**{name: restored(hints[name], item, f"{path}/{name}") for name, item in value.items()})
        origin, of = get_origin(hint), get_args(hint)
        if origin in (dict, Mapping):
            return {key: restored(of[1], item, f"{path}/{key}") for key, item in value.items()}
        if origin in (list, tuple):
            return origin(restored(of[0], item, f"{path}/{number}") for number, item in enumerate(value))
        return value

    restored_object: T = restored(kind, values, "")
    return restored_object


def _digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    named = digest_of((name, tensors[name]) for name in sorted(tensors))
    return hashlib.sha256("\n".join((named, *texts)).encode()).hexdigest()


def require_same(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` if the settings saved at `path` differ from those `given`, naming those that do."""
    if other := sorted(key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key)):
        raise PermpruneError(
            f"{path} was saved with another {', '.join(other)}: use the same, or remove {path.parent} and start again"
        )
