"""Convert parsed JSON to typed dataclasses, checking every value, and back.

Libraries do not replace this: msgspec takes null for no number, drops unknown keys and does not name the keys of a dict
in its messages, and pydantic converts texts to numbers unless it is strict, when it takes no dict for a dataclass.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

EXTRA = "extra"
"""Name of the dataclass field that collects unknown keys, so that they survive reading and rewriting a file."""


class Malformed(ValueError):
    """Raised for a value that does not fit its declared type; the message gives its path and what is wrong."""


def decode(kind: Any, value: object, where: str = "") -> Any:
    """Convert a parsed JSON value to type `kind`; `where` is its path for error messages, e.g. "layers[3].kept".

    `kind` is bool, int, float, str, list[T], dict[str, T], a dataclass, a union of these, `Any`, or
    Annotated[T, range], where a value v is allowed if `v in range`, and `str(range)` describes the allowed values. A
    float may be null, which stands for a non-finite number and becomes NaN; ranges do not apply to it. Raises
    `Malformed` if the value does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value, where)
    if origin is Annotated:
        decoded = decode(arguments[0], value, where)
        finite = not isinstance(decoded, float) or math.isfinite(decoded)
        if finite and decoded not in arguments[1]:
            raise Malformed(f"{where} is {reprlib.repr(decoded)}: it must be {arguments[1]}")
        return decoded
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, where)
    if origin is list:
        items = _expect((list, tuple), "a list", value, where)
        if arguments[0] is int and all(type(item) is int for item in items):  # fast path for long permutations
            return list(items)
        return [decode(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(items)]
    if origin is dict:
        items = _expect(Mapping, "an object", value, where)
        return {
            _text(key, f"a key of {where}"): decode(arguments[1], item, dotted(where, key))
            for key, item in items.items()
        }
    return _decode_fields(kind, _expect(Mapping, "an object", value, where), where)


def encode(value: object) -> Any:
    """Convert a value for `json.dumps`: dataclasses become dicts, and the keys in `extra` are merged into them.

    Fields that do not count when dataclasses are compared are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.compare and field.name != EXTRA]
        return {**{name: encode(getattr(value, name)) for name in names}, **getattr(value, EXTRA, {})}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def dotted(where: str, name: str) -> str:
    """The path of the key `name` in the object at `where`; long or unprintable names are abbreviated."""
    name = name if name.isprintable() and len(name) < 100 else reprlib.repr(name)
    return f"{where}.{name}" if where else name


def _decode_union(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    """Convert to the first type of a union that accepts the value; null becomes None if the union contains it."""
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return decode(kind, value, where)
        except Malformed:
            continue
    return decode(others[-1], value, where)


def _decode_fields(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints, values = _hints(kind), {}
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.name == EXTRA:
            values[EXTRA] = {key: item for key, item in value.items() if key not in hints}
        elif field.name in value:
            values[field.name] = decode(hints[field.name], value[field.name], dotted(where, field.name))
        elif required:
            raise Malformed(f"{where or 'it'} lacks {field.name}")
    try:
        return kind(**values)
    except Malformed as error:  # raised by the dataclass's own checks, which do not know the path
        raise Malformed(f"{where}: {error}" if where else str(error)) from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _expect(kind: Any, what: str, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Malformed(f"{where or 'it'} is {reprlib.repr(value)}, not {what}")
    return value


def _number(value: object, where: str) -> float:
    if value is None:
        return math.nan
    try:
        return float(_expect((int, float), "a number", value, where))
    except OverflowError:
        raise Malformed(f"{where} is out of range") from None


def _text(value: object, where: str) -> str:
    text: str = _expect(str, "a text", value, where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{where} holds half a character (a lone surrogate)") from None
    return text


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    bool: partial(_expect, bool, "true or false"),
    int: partial(_expect, int, "a whole number"),
    float: _number,
    str: _text,
}
"""By type, a function (value, path) that checks a value and returns it."""
