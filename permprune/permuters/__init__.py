"""Permuters: the searches for an order of channels, one file a method."""

from permprune.errors import PermpruneError
from permprune.permuters.base import CurvePoint, LocalPermuter, Permuter, Run, Solution
from permprune.permuters.cp import CP
from permprune.permuters.identity import Identity, Random
from permprune.permuters.learned import Learned
from permprune.permuters.newton import Newton
from permprune.permuters.paper import LearnedPaper
from permprune.permuters.permllm import PermLLM
from permprune.permuters.reconstruction import Reconstruction
from permprune.permuters.ria import RIAPermuter

PERMUTERS: dict[str, type[Permuter]] = {
    method.name: method
    for method in (Identity, Random, RIAPermuter, CP, PermLLM, Reconstruction, LearnedPaper, Learned, Newton)
}


def permuter(name: str | Permuter) -> Permuter:
    """The method of that name with its defaults. Raises `PermpruneError` listing the names when there is none."""
    if isinstance(name, Permuter):
        return name
    if name not in PERMUTERS:
        raise PermpruneError(f'unknown permuter "{name}": choose one of {", ".join(PERMUTERS)}')
    return PERMUTERS[name]()


__all__ = [
    "CP",
    "PERMUTERS",
    "CurvePoint",
    "Identity",
    "Learned",
    "LearnedPaper",
    "LocalPermuter",
    "Newton",
    "PermLLM",
    "Permuter",
    "RIAPermuter",
    "Random",
    "Reconstruction",
    "Run",
    "Solution",
    "permuter",
]
