"""The syntax of method names: permuters, saliencies and updates are given by name, with their options.

A name alone ("newton") is the method with its defaults. Options follow it, each after a colon: "newton:rounds=6". An
object can be given instead of a name, and its description has the same syntax.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from permprune.errors import PermpruneError
from permprune.options import described, nearest, numbers_of, require_choice

T = TypeVar("T")


def method_of(given: str | T, kind: type[T], known: Mapping[str, type[T]]) -> T:
    """Return the method for a name such as "newton:rounds=6"; an object of type `kind` is returned unchanged.

    `known` are the methods by name. Options are separated by colons, as in "newton:rounds=6:distillation=1e-5"; each is
    a numeric field of the method or of its objective, or one for another method, which is given by its name alone, as
    in "newton:start=ria". Raises `PermpruneError` for an unknown name, an unknown option, a value that is invalid for
    the option (see `permprune.options`), and an object without the `name` that tables, records and states need.
    """
    word = kind.__name__.lower()
    if isinstance(given, kind):
        if not isinstance(getattr(given, "name", None), str):
            raise PermpruneError(f'{type(given).__name__} has no name: give its class one, as name = "mine"')
        return given
    if not isinstance(given, str):
        forgotten = isinstance(given, type) and issubclass(given, kind)  # the class, without parentheses
        made = f"{given.__name__}()" if forgotten else f"{kind.__name__} object"  # type: ignore[attr-defined]
        raise PermpruneError(f"the {word} is {reprlib.repr(given)}: give its name, or the {made}")
    name, *changes = given.split(":")
    if name not in known:
        raise PermpruneError(f'unknown {word} "{name}": {nearest(name, known)}')
    method = known[name]()
    simple = {other: made() for other, made in known.items() if not _methods(made(), kind)}
    options, weights = _read_options(name or word, changes, method, dict.fromkeys(_methods(method, kind), simple))
    if weights:
        options["objective"] = dataclasses.replace(_objective(method), **weights)
    return dataclasses.replace(method, **options)  # type: ignore[type-var]


def describe(method: Any) -> str:
    """Return the name of a method with the options that differ from their defaults, such as "newton:rounds=6".

    Options that are not numbers are described too, although `method_of` cannot parse them: a custom permuter that
    starts with the orders of another one is "mine:start=ria".
    """
    changes = (f"{name}={text}" for name, text in _changes(method))
    return ":".join(filter(None, [method.name, *changes])) or "none"


def in_words(method: Any) -> str:
    """Return the description of a method in words: "newton, 6 rounds", "60 steps, blocks first"."""

    def words(option: str, text: str) -> str:
        if text in ("true", "false"):
            return f"{option} first" if text == "true" else f"no {option}"
        if text.isdecimal() and option.endswith("s"):
            return f"1 {option[:-1]}" if text == "1" else f"{text} {option}"
        return f"{option} {text}"

    return ", ".join(filter(None, [method.name, *(words(*change) for change in _changes(method))])) or "none"


def label_of(given: Any) -> str:
    """Return the label of a method in tables and records: the given name, or the description of an object."""
    return given if isinstance(given, str) else describe(given)


def _changes(method: Any) -> Iterator[tuple[str, str]]:
    """Yield the options of a method that differ from their defaults, as pairs of name and text."""
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value == default:
            continue
        if field.name == "objective" and type(value) is type(default) and dataclasses.is_dataclass(value):
            for name, weight in vars(value).items():
                if weight != getattr(default, name):
                    yield name, _text(weight)
        else:
            yield field.name, _text(value)


def _text(value: Any) -> str:
    """Return the text of a value in a method's description."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if dataclasses.is_dataclass(value) and isinstance(getattr(value, "name", None), str):
        return describe(value)
    return described(value)


def _objective(method: Any) -> Any:
    """Return the objective of a method, whose weights are options in the method's name; None if it has none."""
    objective = getattr(method, "objective", None)
    return objective if dataclasses.is_dataclass(objective) else None


def _methods(method: Any, kind: type) -> list[str]:
    """Return the options of a method that are methods of the same kind."""
    return [field.name for field in dataclasses.fields(method) if isinstance(getattr(method, field.name), kind)]


def _read_options(
    name: str, changes: list[str], method: Any, methods: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse "option=value" texts; returns the values by option, first the method's and then its objective's.

    `methods` are the options that are methods, with those that can be given. Raises `PermpruneError` for an unknown or
    repeated option.
    """
    objective, chosen = _objective(method), dict[str, Any]()
    holders = {option: held for held in (method, objective) if held for option in numbers_of(held.__class__)}
    for change in changes:
        option, equals, text = change.partition("=")
        if option in chosen:
            raise PermpruneError(f'"{name}" is given {option} twice: give it once')
        if option in methods:  # no deeper: the colons of a nested method's options would be those of this one
            require_choice(f"{option} of {name}", text, methods[option])
            chosen[option] = methods[option][text]
            continue
        if not equals or option not in holders:
            known = ", ".join(f"{key}={json.dumps(getattr(holder, key))}" for key, holder in holders.items())
            advice = f"give numbers for {known}" if known else "it has none"
            raise PermpruneError(f'"{change}" is not an option of {name}: {advice}')
        chosen[option] = numbers_of(holders[option].__class__)[option].from_text(text)
    options = {option: value for option, value in chosen.items() if holders.get(option, method) is method}
    return options, {option: value for option, value in chosen.items() if option not in options}
