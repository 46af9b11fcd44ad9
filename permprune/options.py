"""Numeric options: the valid range of each is declared once, as the type of a dataclass field.

A field `rounds: Natural = 16` accepts integers from 0. `require_fields` checks all fields of a dataclass when an object
is created, in Python as on the command line; `from_text` parses a value in the name of a method.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from permprune.errors import PermpruneError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MODES = ("fold", "gather")
"""How orders are stored: folded into the weights, or applied with an `index_select` when the model runs."""

PACKED = ("fp32", "bf16", "fp16", "int8", "int4")
"""The types of packed values."""

ROUNDED = ("int8", "int4")
"""Those that weights of any checkpoint are rounded to."""

HEADS = ("int8",)
"""The types that an embedding and a head can be packed as, beside their own."""

MOST = 10**9
"""The largest count: more than is ever useful, but the product of two counts fits in 64 bits."""

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Range:
    """The valid values of an option: finite numbers from `low` (excluded if `open`) to `high` (included)."""

    low: float
    high: float = sys.float_info.max
    open: bool = False

    def __contains__(self, value: Any) -> bool:
        return bool((value > self.low if self.open else value >= self.low) and value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.open else f"from {self.low:,}"
        return f"{low} up" if self.high == sys.float_info.max else f"{low} to {self.high:,}"


Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Length = Annotated[int, Range(2, MOST)]
"""The tokens of a window: the first has none before it that could predict it."""
Seed = Annotated[int, Range(0, 2**63 - 1)]
Bytes = Annotated[int, Range(1, 2**63 - 1)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Number:
    """The values that a field accepts: numbers of type `kind` in `range`, and None if it is `optional`.

    The `range` of bool fields is None.
    """

    kind: type
    range: Range | None
    optional: bool

    @classmethod
    def of(cls, hint: Any) -> Number | None:
        """Return the `Number` for an annotation; None if it is neither bool nor one of the types above."""
        optional = type(None) in get_args(hint)
        if optional:
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        if hint is bool:
            return cls(bool, None, optional)
        if get_origin(hint) is Annotated and isinstance(valid := hint.__metadata__[0], Range):
            return cls(hint.__origin__, valid, optional)
        return None

    def __contains__(self, value: object) -> bool:
        if value is None or isinstance(value, bool):
            return self.optional if value is None else self.kind is bool
        kind = Integral if self.kind is int else Real
        return self.range is not None and isinstance(value, kind) and value in self.range

    def __str__(self) -> str:
        if self.range is None:
            return "true or false"
        return f"a {'whole ' if self.kind is int else ''}number {self.range}"

    def require(self, name: str, value: object) -> None:
        """Raise `PermpruneError` unless the value called `name` is accepted."""
        if value not in self:
            raise PermpruneError(f"{name} is {reprlib.repr(value)}: give {self}")

    def from_text(self, text: str) -> object:
        """Parse a value, which may be out of range; returns the text itself if it cannot be parsed."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(text, text)
        form = _INTEGER if self.kind is int else _NUMBER
        return self.kind(text) if form.fullmatch(text) else text


def described(value: object) -> str:
    """Return a readable description that is the same in every run: the qualified name of a function, or the repr."""
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the advice for an error message about an unknown name: the closest of `names`, or a list of all."""
    known = list(names)
    close = difflib.get_close_matches(name, known, 1)
    return f'did you mean "{close[0]}"?' if close else f"choose one of {', '.join(known)}"


@cache
def numbers_of(options: type) -> Mapping[str, Number]:
    """Return the numeric fields of a dataclass, by name."""
    hints = get_type_hints(options, include_extras=True)
    numbers = {field.name: Number.of(hints[field.name]) for field in fields(options)}
    return {name: number for name, number in numbers.items() if number is not None}


def replace_fields(options: T, changes: Mapping[str, Any], unknown: str) -> T:
    """Return a copy of a dataclass object with other values.

    Raises `PermpruneError`, which begins with `unknown` and names the closest field, for a name that is none.
    """
    known = [field.name for field in fields(options) if field.init]
    for name in changes:
        if name not in known:
            raise PermpruneError(f'{unknown} "{name}": {nearest(name, known)}')
    return replace(options, **changes)


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `PermpruneError`, which names the closest choice, unless `value` is one of `choices`."""
    known = list(choices)
    if value not in known:
        raise PermpruneError(f"{name} is {reprlib.repr(value)}: {nearest(str(value), known)}")


def require_fields(options: Any) -> None:
    """Raise `PermpruneError` for the first field of a dataclass object out of range, or a text in place of a tuple."""
    for field in fields(options):
        if str(field.type) == "tuple[str, ...]" and isinstance(text := getattr(options, field.name), str):
            raise PermpruneError(f'{field.name} is "{text}": give a tuple, such as ("{text}",)')
    for name, number in numbers_of(options.__class__).items():
        number.require(name, getattr(options, name))


def require(name: str, value: object, hint: Any) -> None:
    """Raise `PermpruneError` unless `value` is valid for the annotation `hint`, such as `Count`."""
    number = Number.of(hint)
    assert number is not None, f"{hint} is not a number"
    number.require(name, value)


UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as "8GiB"; returns bytes. Raises `PermpruneError` unless it is positive."""
    number = text.rstrip("BGIKMbgikm")
    try:
        size = int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise PermpruneError(f'"{text}" is not an amount of memory: give one above 0, such as 8GiB or 500MB')
    return size
