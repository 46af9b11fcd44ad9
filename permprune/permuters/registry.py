"""Permuters by name."""

from __future__ import annotations

from permprune.permuters.base import Permuter
from permprune.permuters.cp import CP
from permprune.permuters.identity import Identity, Random
from permprune.permuters.learned import Learned
from permprune.permuters.newton import Newton
from permprune.permuters.paper import LearnedPaper
from permprune.permuters.permllm import PermLLM
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.ria import RIAPermuter
from permprune.registry import method_of

PERMUTERS: dict[str, type[Permuter]] = {
    method.name: method
    for method in (Identity, Random, RIAPermuter, CP, PermLLM, Reconstruction, LearnedPaper, Learned, Newton)
}


def permuter(given: str | Permuter) -> Permuter:
    """The permuter of that name, such as "newton" or "newton:rounds=6", or the object itself (`method_of`)."""
    return method_of(given, Permuter, PERMUTERS)  # type: ignore[type-abstract]
