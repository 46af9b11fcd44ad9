"""Weights that plain Transformers would misread, in files that it does not find."""

from __future__ import annotations

import json
from pathlib import Path

GATHERED, PACKED_WEIGHTS = "gathered.safetensors", "packed.safetensors"
"""Files of the weights of a model with gathers, and of packed weights."""

CURES = {
    GATHERED: "these weights reorder channels at run time - load them with permprune.load",
    PACKED_WEIGHTS: "these weights are packed - import permprune before you load them",
}
"""The text in place of a file's name in the error that plain Transformers raises."""


def stop_transformers(folder: Path, weights: str) -> None:
    """Let `from_pretrained` of plain Transformers stop with an error that names the cure for these weights (`CURES`).

    The folder's config names the cure as the file of weights, which does not exist.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = f"{CURES[weights]}.safetensors"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
