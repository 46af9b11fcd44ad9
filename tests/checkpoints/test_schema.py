"""JSON as dataclasses: what is taken, and what errors say of the rest."""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from permprune.checkpoints.schema import Malformed, decode, encode
from permprune.options import Range


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(0, 1)]
    name: str = "none"


@dataclass(frozen=True)
class Outer:
    count: int
    items: list[Inner]
    table: dict[str, list[int]]
    either: str | bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)


VALUE = {"count": 2, "items": [{"share": 0.5}], "table": {"a": [1, 2]}, "later": {"b": None}}


def test_values_become_fields_and_come_back() -> None:
    found = decode(Outer, VALUE)
    assert found == Outer(2, [Inner(0.5)], {"a": [1, 2]}, None, {"later": {"b": None}})
    assert encode(found) == {**VALUE, "items": [{"share": 0.5, "name": "none"}], "either": None}
    assert decode(Outer, json.loads(json.dumps(encode(found)))) == found


def test_null_is_a_number_that_is_not_finite() -> None:
    assert math.isnan(decode(Inner, {"share": None}).share)
    assert decode(Inner, {"share": math.inf}).share == math.inf
    assert decode(Inner, {"share": 1}).share == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "count is None, not a whole number"),
        ({"count": True}, "count is True, not a whole number"),
        ({"count": 2.0}, "count is 2.0, not a whole number"),
        ({"items": {}}, "items is {}, not a list"),
        ({"items": [3]}, "items[0] is 3, not an object"),
        ({"items": [{}]}, "items[0] lacks share"),
        ({"items": [{"share": 2}]}, "items[0].share is 2.0: it must be from 0 to 1"),
        ({"items": [{"share": "a"}]}, "items[0].share is 'a', not a number"),
        ({"items": [{"share": 10**400}]}, "items[0].share is out of range"),
        ({"table": {"a\n": [None]}}, "table.'a\\n'[0] is None, not a whole number"),
        ({"table": {"a": [True]}}, "table.a[0] is True, not a whole number"),
        ({"table": {"\ud800": []}}, "a key of table holds half a character (a lone surrogate)"),
        ({"either": 3}, "either is 3, not true or false"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed) as caught:
        decode(Outer, {**VALUE, **change})
    assert str(caught.value) == message
