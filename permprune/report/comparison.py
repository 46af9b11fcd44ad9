"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permprune.report import pictures
from permprune.report.words import NONE
from permprune.system.files import write_whole


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a comparison as PNG; `result` is what `Comparison.to_json` returns.

    Raises `PermpruneError` if it cannot be written.
    """
    picture = pictures.comparison(result["rows"], result["metric"], comparison_title(result), "png")
    write_whole(path, lambda temporary: temporary.write_bytes(picture))


def comparison_title(result: Mapping[str, Any]) -> str:
    """Return a title that lists what the rows of a comparison have in common."""
    title = f"{result['model']}, {result['pattern']}, {result['saliency']} masks, {result['mode']} mode"
    return title if result["update"] == NONE else f"{title}, {result['update']} update"
