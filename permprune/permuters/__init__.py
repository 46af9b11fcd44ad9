"""Permuters: the searches for an order of channels, one file a method."""

import dataclasses
import json
from typing import Any

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
    """The method of that name, with its defaults but for the options that follow: "newton", "newton:rounds=6".

    More options follow as the first does, "newton:rounds=6:distillation=1e-5"; each is a number, of the method or of
    its `Objective`. Raises `PermpruneError` that lists the names, or the method's options, when there is none such.
    """
    if isinstance(name, Permuter):
        return name
    name, *changes = name.split(":")
    if name not in PERMUTERS:
        raise PermpruneError(f'unknown permuter "{name}": choose one of {", ".join(PERMUTERS)}')
    method = PERMUTERS[name]()
    objective = getattr(method, "objective", None)
    numbers, losses = _numbers(method), _numbers(objective) if objective else {}
    for change in changes:
        option, _, text = change.partition("=")
        values = losses if option in losses else numbers
        try:
            kind = float if values[option] is None else type(values[option])
            values[option] = kind(json.loads(text))
        except (KeyError, ValueError, TypeError) as error:
            known = ", ".join(f"{option}={json.dumps(value)}" for option, value in (numbers | losses).items())
            raise PermpruneError(f'"{change}" is no option of {name}: give numbers for {known or "none"}') from error
    if objective:
        method = dataclasses.replace(method, objective=dataclasses.replace(objective, **losses))  # type: ignore[call-arg]
    return dataclasses.replace(method, **numbers)


def _numbers(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, or None where the data decide on one."""
    values = {option.name: getattr(options, option.name) for option in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, (int, float))}


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
