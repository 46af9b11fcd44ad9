"""The page of a run: one self-contained HTML file with the decision first, and the picture of a comparison."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from permprune.checkpoint import write_whole
from permprune.report import pictures
from permprune.report.words import duration, fine_percent, number, percent

NO_PERMUTATION = NO_UPDATE = "none"


def render(record: Mapping[str, Any]) -> str:
    """The page for the contents of a permprune.json. Everything from the record is escaped."""
    return _template().render(
        record=record,
        title=f"{record['model']}, {record['settings']['pattern']}",
        decision=decision(record),
        table=_table(record),
        pictures=_pictures(record),
        spaces=_spaces(record),
    )


def write_report(record: Mapping[str, Any], path: Path) -> None:
    """Write the page of `record`; readers of `path` see all of it or nothing. Raises `PermpruneError`."""
    page = render(record)
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def write_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a comparison as PNG; `result` is what `permprune.compare` returns.

    Raises `PermpruneError`.
    """
    picture = pictures.comparison(result["rows"], result["metric"], comparison_title(result), "png")
    write_whole(path, lambda temporary: temporary.write_bytes(picture))


def comparison_title(result: Mapping[str, Any]) -> str:
    """What the rows of a comparison have in common."""
    title = f"{result['model']}, {result['pattern']}, {result['saliency']} masks, {result['mode']} mode"
    return title if result["update"] == NO_UPDATE else f"{title}, {result['update']} update"


def decision(record: Mapping[str, Any]) -> str:
    """What the run came to, in one sentence."""
    method = record["settings"]["permute"]
    run = f"{record['settings']['pattern']} with {method}"
    measured = record["measured"]
    if method == NO_PERMUTATION:
        run = f"{record['settings']['pattern']} in natural order"
    if (update := record["settings"]["update"]) != NO_UPDATE:
        run += f", then {update}"
    if measured is None:
        return f"{run}: {_error_clause(record)}the network was not measured."
    dense, none, pruned = (number(measured[key]) for key in ("dense", "none", "pruned"))
    if method == NO_PERMUTATION:
        return f"{run}: {measured['metric']} {pruned} against {dense} dense."
    return (
        f"{run}: {measured['metric']} {pruned} against {dense} dense and {none} without permutation"
        f"{_gap(record['gap_closed'])}."
    )


def _gap(closed: float | None) -> str:
    if closed is None:
        return ""
    return f": {percent(closed)} of the gap closed" if closed >= 0 else f": the gap is {percent(-closed)} wider"


def _error_clause(record: Mapping[str, Any]) -> str:
    layers = record["layers"]
    if not layers:
        return ""
    after, before = (fine_percent(fmean(layer[key] for layer in layers)) for key in ("error", "error_none"))
    if record["settings"]["permute"] == NO_PERMUTATION:
        return f"mean output error of a layer {before}; "
    return f"mean output error of a layer {after} against {before} without permutation; "


def _table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of what was measured: its name; dense; pruned in natural order; pruned as permuted."""
    rows: list[tuple[str, ...]] = []
    if (measured := record["measured"]) is not None:
        rows.append((measured["metric"], *(number(measured[key]) for key in ("dense", "none", "pruned"))))
        rows.append(("gap closed", "", "", percent(record["gap_closed"])))
    if layers := record["layers"]:
        kept, error = (
            [fine_percent(fmean(layer[key] for layer in layers)) for key in keys]
            for keys in (("kept_none", "kept"), ("error_none", "error"))
        )
        rows.append(("kept saliency, mean", "100 %", kept[0], kept[1]))
        rows.append(("output error, mean", "0 %", error[0], error[1]))
    return rows


def _pictures(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, what there is to see, and the SVG as a data URI."""
    found: list[tuple[str, str, bytes]] = []
    if (measured := record["measured"]) is not None:
        values = (measured["dense"], measured["none"], measured["pruned"])
        picture = pictures.bars(*values, measured["metric"], record["settings"]["permute"])
        text = f"{measured['count']:,} {measured['unit']} of {measured['data']}."
        found.append((measured["metric"].capitalize(), text, picture))
    if record["curve"]:
        text = "Each round is kept only if the loss on held-out calibration data falls."
        found.append(("Search", text, pictures.learning_curve(record["curve"])))
    if layers := record["layers"]:
        text = "Squared error of each layer's output, relative to the output. Lower is better."
        found.append(("Output error by layer", text, pictures.output_error(layers)))
        text = "Share of the squared saliency that the mask keeps. Higher is better."
        found.append(("Kept saliency by layer", text, pictures.kept_saliency(layers)))
    return [(title, text, _data_uri(picture)) for title, text, picture in found]


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def _spaces(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of what was permuted: its name; how it is stored; its blocks; channels of a block; share that moved."""
    orders = [(name, "folded", table) for name, table in record["permutations"].items()]
    orders += [(gather["site"], "gather", [gather["order"]]) for gather in record["gathers"]]
    return [(name, how, f"{len(table):,}", f"{len(table[0]):,}", percent(_moved(table))) for name, how, table in orders]


def _moved(table: list[list[int]]) -> float:
    return fmean(place != channel for block in table for place, channel in enumerate(block))


@cache
def _template() -> Template:
    loader = PackageLoader("permprune.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=duration, percent=fine_percent)
    return environment.get_template("template.html")
