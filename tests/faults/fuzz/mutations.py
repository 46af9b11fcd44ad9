"""Random damage to the files of a folder: bytes, truncations, values of JSON, headers and weights of safetensors."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[random.Random, bytes], bytes]

WEIRD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**30, -(10**9), 1e308, 1e-320, -0.5, float("nan"), float("inf"),
    "", " ", "x" * 5000, "../../etc/passwd", "\ud800", "\0", "<script>", "auto", [], {}, [[]], [None], {"": None},
]  # fmt: skip
"""What takes the place of a value."""


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def flip(generator: random.Random, data: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 8])):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def overwrite(generator: random.Random, data: bytes) -> bytes:
    """A range of bytes, by zeros, ones, or noise."""
    first = generator.randrange(len(data))
    count = min(len(data) - first, generator.choice([1, 16, 300, 5000]))
    filling = generator.choice([b"\0" * count, b"\xff" * count, generator.randbytes(count)])
    return data[:first] + filling + data[first + count :]


def truncate(generator: random.Random, data: bytes) -> bytes:
    return data[: generator.choice([0, 1, 7, 8, 9, len(data) - 1, generator.randrange(len(data))])]


def extend(generator: random.Random, data: bytes) -> bytes:
    return data + generator.choice([b"\0", b"\n", b"}", generator.randbytes(100), data])


def change_json(generator: random.Random, data: bytes) -> bytes:
    """A value, a key, or the order of a list, somewhere in a JSON text."""
    value = json.loads(data)
    if generator.random() < 0.1:  # in no text that json.dumps writes
        text = json.dumps(value)
        comma = generator.choice([at for at, letter in enumerate(text) if letter in ",:{["])
        return (
            text[:comma] + generator.choice([",", "[" * 3000, "]", "NaN", "1e999", "'", "/*"]) + text[comma:]
        ).encode()
    places = [(value, key) for value in _containers(value) for key in _keys(value)]
    held, key = generator.choice(places)
    _change(generator, held, key)
    return json.dumps(value).encode()


def _change(generator: random.Random, held: Any, key: Any) -> None:
    kind, old = generator.randrange(8), held[key]
    if kind == 0:
        del held[key]
    elif kind == 1 and isinstance(old, list) and old:
        generator.shuffle(old)
    elif kind == 2 and isinstance(old, list) and old:
        old.append(generator.choice(old))
    elif kind == 3 and isinstance(held, dict):
        held[generator.choice([key + "x", "", key.upper(), "format", "auto_map"])] = held.pop(key)
    elif kind == 4:
        other = generator.choice(_keys(held))
        held[key], held[other] = held[other], held[key]
    elif kind == 5 and isinstance(old, (int, float)) and not isinstance(old, bool):
        held[key] = generator.choice([old + 1, -old, old * 2, old / 2, float(old), str(old)])
    elif kind == 6:
        held[key] = nested(generator.choice([3, 500, 900]))
    else:
        held[key] = generator.choice(WEIRD)


def _containers(value: Any) -> list[Any]:
    """Every list and dict in a value that holds something."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(found for item in inside for found in _containers(item))] if inside else []


def _keys(held: Any) -> list[Any]:
    return list(held) if isinstance(held, dict) else list(range(len(held)))


def change_header(generator: random.Random, data: bytes) -> bytes:
    """A value in the header of a safetensors file, whose length is told right."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(generator, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def change_weights(generator: random.Random, data: bytes) -> bytes:
    """Bytes behind the header of a safetensors file."""
    size = 8 + int.from_bytes(data[:8], "little")
    return data[:size] + generator.choice([flip, overwrite])(generator, data[size:])


def change_number(generator: random.Random, data: bytes) -> bytes:
    """A number of a tensor in a safetensors file, by one that is odd in its type or in another."""
    size = 8 + int.from_bytes(data[:8], "little")
    entries = [entry for entry in json.loads(data[8:size]).values() if "data_offsets" in entry]
    first, last = (size + offset for offset in generator.choice(entries)["data_offsets"])
    number = generator.choice(ODD)
    at = generator.randrange(first, max(first + 1, last - 3), 4)
    return data[:at] + number + data[at + len(number) :]


ODD = [struct.pack("<f", x) for x in (math.nan, math.inf, -math.inf, 1e38, 1e-38, 0.0, -1.0, 1.0, 65504.0)]
ODD += [struct.pack("<i", x) for x in (0, 1, -1, 7, 8, 2**31 - 1, -(2**31))] + [b"\xff\x7f", b"\x80\x7f", b"\x7f"]
"""Bytes of numbers: floats, integers, and those of bf16 and int8."""

ANY: dict[str, Damage] = {"flip": flip, "overwrite": overwrite, "truncate": truncate, "extend": extend}
OWN: dict[str, dict[str, Damage]] = {
    ".json": {"json": change_json},
    ".safetensors": {"header": change_header, "weights": change_weights, "number": change_number},
}


def mutate(generator: random.Random, folder: Path) -> tuple[str, str]:
    """Damage a file of a folder; returns its name and the kind of damage."""
    names = sorted(path.name for path in folder.iterdir())
    name = generator.choice([name for name in names for _ in range(3 if Path(name).suffix in OWN else 1)])
    path = folder / name
    kind = generator.choice([*ANY, *list(OWN.get(path.suffix, {})) * 4, "missing", "swapped", "folder"])
    if kind == "missing":
        path.unlink()
    elif kind == "swapped":
        shutil.copyfile(folder / generator.choice([other for other in names if other != name]), path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        damage = (ANY | OWN.get(path.suffix, {}))[kind]
        path.write_bytes(damage(generator, path.read_bytes()))
    return name, kind
