"""Models side by side: figures and answers to examples, for terminals, pages and cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from permprune.checkpoints.record import PACKED, SIDES
from permprune.pattern import MIXED
from permprune.report.words import DASH, columns, count, number, percent

Mark = Literal["", "right", "wrong", "missing"]

STYLES: dict[Mark, str] = {"": "", "right": "green", "wrong": "red", "missing": "red strike"}

SIGNS: dict[Mark, str] = {"": "{}", "right": "{} \N{CHECK MARK}", "wrong": "{} \N{MULTIPLICATION X}", "missing": "[{}]"}
"""How text without colors shows a mark."""

JUDGED = ("words", "classes", "neighbours")
"""Kinds whose answers are right or wrong; without an expected answer the dense model's is the right one."""


class Piece(NamedTuple):
    """A part of an answer, and what is marked there."""

    text: str
    mark: Mark


def titles(pattern: str, pruned: str = "permprune") -> list[str]:
    """Return the titles of the columns of models, in the order of `SIDES`."""
    return ["dense", "plain N:M" if pattern == MIXED else f"plain {pattern}", pruned]


def side_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table of models: name; dense; pruned in natural order; pruned by permprune."""
    rows: list[tuple[str, ...]] = []
    if (measured := record["measured"]) is not None:
        for one in (measured, *measured.get("others", ())):
            rows.append((one["metric"], *(number(one[key]) for key in SIDES)))
        rows.append(("gap closed", "", "", percent(record["gap_closed"])))
    if (shown := record.get("showcase")) is not None:
        sides = [shown["sides"].get(side) or {} for side in SIDES]
        rows.append(("MB", *(_megabytes(side.get("bytes")) for side in sides)))
        if sides[2].get("packed"):
            rows.append(("MB in 16 bits, packed", *(_megabytes(side.get("packed")) for side in sides)))
        if shown["unit"]:
            rows.append((shown["unit"], *(number(side.get("speed")) for side in sides)))
    return rows


def side_table(record: Mapping[str, Any]) -> Table:
    """Return the table of models for a terminal."""
    models = columns(*titles(record["settings"]["pattern"]))
    title, note = f"{record['model']} on this machine", table_note(record)
    table = Table("", *models, title=title, caption=note, caption_justify="left")
    for row in side_rows(record):
        table.add_row(*row)
    return table


def table_note(record: Mapping[str, Any]) -> str:
    """Describe how the figures of a table were measured: before packing, and the speeds; "" if there is nothing."""
    measured, packed, shown = record["measured"], record.get(PACKED), record.get("showcase") or {}
    notes = []
    if measured and packed and measured.get("packed") != packed["dtype"]:
        notes.append(f"The {measured['metric']} is that of before the weights were packed as {packed['dtype']}.")
    if shown.get("unit"):
        types = [
            f"{title} in {dtype}"
            for title, side in zip(titles(record["settings"]["pattern"]), SIDES, strict=True)
            if (dtype := (shown["sides"].get(side) or {}).get("dtype"))
        ]
        notes.append(f"Speed on {count(shown['threads'], 'thread')} of the {shown['device']}: {'; '.join(types)}.")
    return " ".join(notes)


def answers(shown: Mapping[str, Any], example: Mapping[str, Any]) -> list[list[Piece]]:
    """Return the answers to an example in the order of `SIDES`, with what is right, wrong or missing in each."""
    given: Mapping[str, str] = example["answers"]
    expected = example["expected"]
    if shown["kind"] == "transcripts" and expected is not None:
        return [list(_compared(expected, given.get(side, ""))) for side in SIDES]
    if shown["kind"] not in JUDGED:
        return [[Piece(given.get(side, DASH), "")] for side in SIDES]
    right = given.get("dense") if expected is None else expected
    judged = SIDES if expected is not None else SIDES[1:]
    return [
        [Piece(given.get(side, DASH), ("right" if given.get(side) == right else "wrong") if side in judged else "")]
        for side in SIDES
    ]


def plain(pieces: list[Piece]) -> str:
    """Return an answer as text without colors."""
    return " ".join(SIGNS[mark].format(text) if text else "" for text, mark in pieces).strip() or "(nothing)"


def examples_shown(shown: Mapping[str, Any], names: Sequence[str]) -> Group:
    """Return examples for a terminal: a block for each or, if the answers are short, a table.

    `names` are the titles of the models.
    """
    if not shown["examples"]:
        return Group(Text(shown["note"]))
    parts = [_strip(shown, names)] if shown["kind"] in ("classes", "scores", "words") else [*_blocks(shown, names)]
    return Group(*parts, Text(shown["note"], style="dim"))


def _strip(shown: Mapping[str, Any], names: Sequence[str]) -> Table:
    labelled = any(example["expected"] is not None for example in shown["examples"])
    table = Table()
    table.add_column("example", overflow="fold", max_width=70)
    for title in [*(["expected"] if labelled else []), *names]:
        table.add_column(title)
    for example in shown["examples"]:
        expected = [Text(example["expected"] or "")] if labelled else []
        table.add_row(Text(example["given"]), *expected, *map(_colored, answers(shown, example)))
    return table


def _blocks(shown: Mapping[str, Any], names: Sequence[str]) -> Iterator[Text | Padding]:
    for example in shown["examples"]:
        yield Text(example["given"], style="bold")
        grid = Table.grid(padding=(0, 2))
        if example["expected"] is not None:
            grid.add_row(Text("expected", style="dim"), Text(example["expected"]))
        for name, pieces in zip(names, answers(shown, example), strict=True):
            grid.add_row(Text(name, style="dim"), _colored(pieces))
        yield Padding(grid, (0, 0, 1, 2))


def _colored(pieces: list[Piece]) -> Text:
    marked = [Text(SIGNS[mark].format(text), STYLES[mark]) for text, mark in pieces if text]
    return Text(" ").join(marked) if marked else Text("(nothing)")


def _compared(expected: str, answer: str) -> Iterator[Piece]:
    """Compare the words of an answer with those that were expected."""
    wanted, written = expected.split(), answer.split()
    for kind, i, j, k, m in SequenceMatcher(None, wanted, written, autojunk=False).get_opcodes():
        if kind == "equal":
            yield Piece(" ".join(written[k:m]), "")
            continue
        if wanted[i:j]:
            yield Piece(" ".join(wanted[i:j]), "missing")
        if written[k:m]:
            yield Piece(" ".join(written[k:m]), "wrong")


def _megabytes(size: int | None) -> str:
    return DASH if size is None else number(size / 1e6)
