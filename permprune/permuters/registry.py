"""Registry of permuters by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from permprune.errors import PermpruneError
from permprune.permuters.base import Identity, Permuter, Random, ScorePermuter
from permprune.permuters.cost_matrix import LearnedPaper, PermLLM
from permprune.permuters.cp import CP
from permprune.permuters.kept import RIAPermuter
from permprune.permuters.learned import Learned
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.trust_region import Newton
from permprune.registry import label_of, method_of

PERMUTERS: dict[str, type[Permuter]] = {
    method.name: method
    for method in (Identity, Random, RIAPermuter, CP, PermLLM, Reconstruction, LearnedPaper, Learned, Newton)
}


def permuter(given: str | Permuter) -> Permuter:
    """Return the permuter of a name such as "newton:rounds=6"; an object is returned as it is (`method_of`)."""
    return method_of(given, Permuter, PERMUTERS)  # type: ignore[type-abstract]


def score_permuter(given: str | ScorePermuter) -> ScorePermuter:
    """Return the permuter of a name that `ScorePermuter` is a base of. Raises `PermpruneError` for another one."""
    method = permuter(given)
    if not isinstance(method, ScorePermuter):
        fitting = ", ".join(name for name, kind in PERMUTERS.items() if issubclass(kind, ScorePermuter))
        raise PermpruneError(f"{method.name} orders the channels of weights, not of a cache: choose one of {fitting}")
    return method


def permuters(methods: Sequence[str | Permuter] | Mapping[str, str | Permuter]) -> dict[str, Permuter]:
    """Return permuters by their labels in tables: the keys of a mapping, or the labels of the methods (`label_of`)."""
    if isinstance(methods, Mapping):
        return {label: permuter(method) for label, method in methods.items()}
    return {label_of(method): made for made, method in [(permuter(method), method) for method in methods]}
