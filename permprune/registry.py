"""Methods by name: the language in which permuters, saliencies and updates are named, with their options.

A name alone ("newton") is the method with its defaults; options follow it, each after a colon: "newton:rounds=6". An
object may stand wherever a name may, and is described in the same language.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from permprune.errors import PermpruneError
from permprune.options import described, nearest, numbers_of

T = TypeVar("T")


def method_of(given: str | T, kind: type[T], known: Mapping[str, type[T]]) -> T:
    """The method that a name stands for, such as "newton" or "newton:rounds=6"; an object of this `kind` as it is.

    More options follow as the first does, "newton:rounds=6:distillation=1e-5"; each is a number, of the method or of
    its objective. Raises `PermpruneError` that lists the names, or the method's options, where there is none such, and
    for a value that the option does not take (see `permprune.options`).
    """
    word = kind.__name__.lower()
    if isinstance(given, kind):
        return _named(given)
    if not isinstance(given, str):
        forgotten = isinstance(given, type) and issubclass(given, kind)  # its parentheses
        made = f"{given.__name__}()" if forgotten else f"{kind.__name__} object"  # type: ignore[attr-defined]
        raise PermpruneError(f"the {word} is {reprlib.repr(given)}: give its name, or the {made}")
    name, *changes = given.split(":")
    if name not in known:
        raise PermpruneError(f'unknown {word} "{name}": {nearest(name, known)}')
    method = known[name]()
    own, weights = _read_options(name, changes, method)
    if weights:
        own["objective"] = dataclasses.replace(_objective(method), **weights)
    return dataclasses.replace(method, **own)  # type: ignore[type-var]


def describe(method: Any) -> str:
    """A method in the language of names: "newton:rounds=6", the options at their defaults left out.

    Options that are no numbers, which the language has no words for, are described as well as may be: an own permuter
    that begins with another's orders is "mine:start=ria".
    """
    return ":".join([method.name, *(f"{name}={text}" for name, text in _changes(method))])


def label_of(given: Any) -> str:
    """A method as it was named, or its description: what tables and records call it."""
    return given if isinstance(given, str) else describe(given)


def _changes(method: Any) -> Iterator[tuple[str, str]]:
    """The options that are not at their defaults."""
    for field in dataclasses.fields(method):
        value, default = getattr(method, field.name), _default(field)
        if value == default:
            continue
        if field.name == "objective" and type(value) is type(default) and dataclasses.is_dataclass(value):
            for own in dataclasses.fields(value):
                if getattr(value, own.name) != getattr(default, own.name):
                    yield own.name, _text(getattr(value, own.name))
        else:
            yield field.name, _text(value)


def _text(value: Any) -> str:
    """A value in the language of names, or as a person reads it."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if dataclasses.is_dataclass(value) and isinstance(getattr(value, "name", None), str):
        return describe(value)
    return described(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _objective(method: Any) -> Any:
    """What a method that has one minimises, whose weights are options of the method's name."""
    objective = getattr(method, "objective", None)
    return objective if dataclasses.is_dataclass(objective) else None


def _read_options(name: str, changes: list[str], method: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that "option=value" give, by option: those of the method, and those of its objective."""
    objective, chosen = _objective(method), {}
    holders = {option: held for held in (method, objective) if held for option in numbers_of(type(held))}
    for change in changes:
        option, equals, text = change.partition("=")
        if option in chosen:
            raise PermpruneError(f'"{name}" is given {option} twice: give it once')
        if not equals or option not in holders:
            known = ", ".join(f"{key}={json.dumps(getattr(holder, key))}" for key, holder in holders.items())
            advice = f"give numbers for {known}" if known else "it has none"
            raise PermpruneError(f'"{change}" is no option of {name}: {advice}')
        chosen[option] = numbers_of(type(holders[option]))[option].from_text(text)
    own = {option: value for option, value in chosen.items() if holders[option] is method}
    return own, {option: value for option, value in chosen.items() if option not in own}


def _named(method: T) -> T:
    """The method, if its class has a name, by which tables, records and states call it."""
    if not isinstance(getattr(method, "name", None), str):
        raise PermpruneError(f'{type(method).__name__} has no name: give its class one, as name = "mine"')
    return method
