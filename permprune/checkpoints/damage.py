"""Which file of a checkpoint cannot be read, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"

PICKLES = "pytorch_model*.bin"


def damage(source: str | Path, weights: bool = False) -> str | None:
    """The first file of a checkpoint's folder that is damaged, in a clause; None where each can be read.

    Looked for after loading failed, where what Transformers raised may not name the file. With `weights` it were those
    that did not load: if they are pickled, that is why. Nothing is unpickled.
    """
    folder = Path(source)
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path.name} is no valid JSON ({first_line(error)})"
        if path.name.endswith("config.json") and not isinstance(content, dict):
            return f"{path.name} is no JSON object"
        if path.name == INDEX and (fault := _index_damage(content, folder)):
            return fault
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is damaged ({first_line(error).removeprefix('Error while deserializing header: ')})"
    pickles = [] if any(folder.glob("model*.safetensors")) else sorted(folder.glob(PICKLES))
    if weights and pickles:
        return (
            f"{pickles[0].name} holds pickled weights, which can run code, so that only plain tensors are read, and "
            "those whole: convert it to safetensors"
        )
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing, or a key alone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown key {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _index_damage(content: Any, folder: Path) -> str | None:
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        return f"{INDEX} names no files of weights"
    absent = [file for file in dict.fromkeys(files.values()) if not (folder / file).is_file()]
    return f"{INDEX} names {absent[0]}, which is absent" if absent else None
