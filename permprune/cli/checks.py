"""The checks of a command's names and paths, made before anything slow is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permprune.errors import PermpruneError

STDOUT = (Path("-"), Path("/dev/stdout"))
"""The values of --json for stdout."""


def require_text(options: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` for options with characters that neither names nor contents of files can have."""
    for name, values in _given(options).items():
        for text in map(str, values):
            if "\0" in text or text != text.encode(errors="ignore").decode():
                raise PermpruneError(f"{name} contains a NUL character or bytes that are not UTF-8: remove them")


def require_files(options: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` for models, data and folders that do not exist, and outputs that cannot be written."""
    from permprune.data.sources import require_source
    from permprune.system.files import require_new, require_writable
    from permprune.zoo.models import require_model

    try:
        os.getcwd()
    except OSError as error:
        raise PermpruneError("the working directory does not exist any more: change to another one") from error
    checks = (
        (("model", "teacher", "dense"), require_model),
        (("folder", "folders", "kv"), _require_folder),
        (("data", "dev", "calibration"), require_source),
        (("out", "fold"), require_new),  # before hours of work, not after
        (("json",), require_writable),
    )
    given = _given(options)
    for names, require in checks:
        for name in names:
            for value in given.get(name, ()):
                if name != "json" or value not in STDOUT:
                    try:
                        require(value)
                    except OSError as error:  # for instance of a name that is too long
                        raise PermpruneError(f"{name} cannot be looked for: {error.strerror}") from error


def _given(options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of the options that were given."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return {name: [value for value in values if value is not None] for name, values in lists.items()}


def _require_folder(folder: Path | str) -> None:
    if not Path(folder).is_dir():
        raise PermpruneError(f"there is no folder {folder}: give an existing one")
