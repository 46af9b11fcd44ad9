"""What the Tab key completes: names, which are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from permprune.config import EFFORTS, PRECISIONS
from permprune.options import MODES


def _models() -> Iterable[str]:
    from permprune.zoo.models import MODELS

    return MODELS


def _permuters() -> Iterable[str]:
    from permprune.permuters.registry import PERMUTERS

    return PERMUTERS


def _saliencies() -> Iterable[str]:
    from permprune.saliency.registry import SALIENCIES

    return SALIENCIES


def _updates() -> Iterable[str]:
    from permprune.updates.registry import UPDATES

    return UPDATES


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    **dict.fromkeys(("model", "teacher", "dense"), _models),
    **dict.fromkeys(("permute", "methods"), _permuters),
    "saliency": _saliencies,
    "update": _updates,
    "effort": lambda: EFFORTS,
    "mode": lambda: MODES,
    "precision": lambda: PRECISIONS,
}
"""The names that an option or argument may have, by its own."""


def completion_of(option: str) -> Callable[[str], list[str]] | None:
    """Return the function that completes the value of an option, also after a comma; None if it has no names."""
    if option not in NAMES:
        return None

    def complete(incomplete: str) -> list[str]:
        before = "".join(incomplete.rpartition(",")[:2])
        return [before + name for name in NAMES[option]()]

    return complete
