"""Find the damaged file or tensor of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from permprune.checkpoints.probe import PROBE
from permprune.errors import PermpruneError, first_line
from permprune.system.digests import digest_of

INDEX = "model.safetensors.index.json"

PICKLES = "pytorch_model*.bin"


def damage(source: str | Path, weights: bool = False) -> str | None:
    """Describe the first damaged file in a checkpoint's folder, as a clause for an error message; None if all are fine.

    Called after loading has failed, because the error from Transformers may not name the file. With `weights`, the
    weights failed to load, and pickled weights are reported as the cause. Nothing is unpickled here.
    """
    folder = Path(source)
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path.name} is not valid JSON ({first_line(error)})"
        if path.name.endswith("config.json") and not isinstance(content, dict):
            return f"{path.name} is not a JSON object"
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
            f"{pickles[0].name} contains pickled weights, which can run code, so only plain, intact tensors are read: "
            "convert it to safetensors"
        )
    return None


def weight_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor in the safetensors files of a folder, with its type and shape, by its name.

    Several threads read the files. Raises `SafetensorError` or `OSError` if a file cannot be read.
    """
    with ExitStack() as opened, ThreadPoolExecutor() as threads:
        paths = sorted(path for path in folder.glob("*.safetensors") if path.name != PROBE)
        files = [opened.enter_context(safe_open(path, "pt")) for path in paths]
        named = [(file, name) for file in files for name in file.keys()]  # noqa: SIM118 (no mapping)
        digests = threads.map(lambda entry: digest_of([(entry[1], entry[0].get_tensor(entry[1]))]), named)
        return {name: digest for (_, name), digest in zip(named, digests, strict=True)}


def require_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise `PermpruneError` if a tensor in a folder is not the one with this digest in the folder's record.

    A record without digests, of an earlier release, and a folder without weights are not compared.
    """
    present = weight_digests(folder) if digests else {}
    changed = [name for name in {**digests, **present} if digests.get(name) != present.get(name)] if present else []
    if changed:
        more = f", as are {len(changed) - 1} other tensors" if len(changed) > 1 else ""
        raise PermpruneError(
            f"{folder}: {changed[0]} is not as permprune wrote it{more}: copy the folder again; if you trained it, "
            "do so after permprune.load, and write it with permprune.save"
        )


def _index_damage(content: Any, folder: Path) -> str | None:
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        return f"{INDEX} names no files of weights"
    absent = [file for file in dict.fromkeys(files.values()) if not (folder / file).is_file()]
    return f"{INDEX} names {absent[0]}, which is absent" if absent else None
