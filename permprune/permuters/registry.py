"""Permuters by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from permprune.errors import PermpruneError
from permprune.options import nearest, numbers_of
from permprune.permuters.base import Permuter
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
    its `Objective`. Raises `PermpruneError` that lists the names, or the method's options, when there is none such, and
    for a value that the option does not take (see `permprune.options`).
    """
    if isinstance(name, Permuter):
        return name
    name, *changes = name.split(":")
    if name not in PERMUTERS:
        raise PermpruneError(f'unknown permuter "{name}": {nearest(name, PERMUTERS)}')
    method = PERMUTERS[name]()
    objective = getattr(method, "objective", None)
    holders = {option: held for held in (method, objective) if held for option in numbers_of(type(held))}
    chosen = _read_options(name, changes, holders)
    own, weights = (
        {key: value for key, value in chosen.items() if holders[key] is held} for held in (method, objective)
    )
    if objective:
        own["objective"] = dataclasses.replace(objective, **weights)
    return dataclasses.replace(method, **own)


def _read_options(name: str, changes: list[str], holders: dict[str, Any]) -> dict[str, Any]:
    """The values that "option=value" give, by option; `holders` are the dataclasses that have the options."""
    chosen: dict[str, Any] = {}
    for change in changes:
        option, equals, text = change.partition("=")
        if option in chosen:
            raise PermpruneError(f'"{name}" is given {option} twice: give it once')
        if not equals or option not in holders:
            known = ", ".join(f"{key}={json.dumps(getattr(holder, key))}" for key, holder in holders.items())
            raise PermpruneError(f'"{change}" is no option of {name}: give numbers for {known or "none"}')
        chosen[option] = numbers_of(type(holders[option]))[option].from_text(text)
    return chosen
