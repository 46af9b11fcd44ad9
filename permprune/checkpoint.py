"""The state from which an interrupted search goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permprune import parallel
from permprune.errors import PermpruneError
from permprune.system.files import write_whole


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
