"""The HTML page of a run: the result in a sentence, then three pictures, then settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from permprune.checkpoints.record import SIDES
from permprune.models.layers import DenseWeights
from permprune.report import pictures
from permprune.report.page import data_uri, fill
from permprune.report.showcase import answers, side_rows, table_note, titles
from permprune.report.words import (
    NONE,
    count,
    duration,
    fine_percent,
    number,
    outcome,
    overlap_note,
    percent,
    trained,
    way,
)
from permprune.system.files import write_whole

REPORT = "report.html"


def render(record: Mapping[str, Any]) -> str:
    """Render the page for the contents of a permprune.json. Everything from the record is escaped."""
    shown = record.get("showcase")
    return fill(
        "run.html",
        record=record,
        model=record["model"],
        version=record["version"],
        title=f"{record['model']}, {record['settings']['pattern']}",
        decision=_pruned(record),
        trained=_then_trained(record),
        overlap=overlap_note((record["measured"] or {}).get("overlap")),
        table=measured_rows(record),
        titles=titles(record["settings"]["pattern"]),
        table_note=table_note(record),
        shown=shown,
        sides=SIDES,
        examples=[(one, answers(shown, one)) for one in shown["examples"]] if shown else [],
        dense=dense_sentence(record.get("dense")),
        mix=mix_sentences(record),
        pictures=_pictures(record),
        times={name: duration(seconds) for name, seconds in record["seconds"].items()},
    )


def write_report(record: Mapping[str, Any], path: Path) -> None:
    """Write the page of `record` atomically. Raises `PermpruneError` if it cannot be written."""
    page = render(record)
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def decision(record: Mapping[str, Any]) -> str:
    """Summarise the result of a run in one sentence, or in two if training followed."""
    return " ".join(filter(None, (_pruned(record), _then_trained(record))))


def _pruned(record: Mapping[str, Any]) -> str:
    settings, measured = record["settings"], record["measured"]
    method = settings["order"]
    run = way(settings["pattern"], method, settings["update"], settings.get("train", NONE))
    if measured is None:
        return f"{run}: {_error_clause(record)}the network was not measured."
    none = None if method == NONE else measured["none"]
    sentence = run + outcome(measured["metric"], measured["pruned"], measured["dense"], none)
    if method != NONE and (closed := record["gap_closed"]) is not None:
        gap = f"{percent(closed)} of the gap closed" if closed >= 0 else f"the gap is {percent(-closed)} wider"
        sentence += f": {gap}"
    return f"{sentence}."


def _then_trained(record: Mapping[str, Any]) -> str:
    """Summarise training after pruning in one sentence; "" if there was none."""
    if (optimised := record.get("optimised")) is None:
        return ""
    metric, before, after, error = (optimised[key] for key in ("metric", "before", "after", "stderr"))
    return trained(metric, before, after, error, optimised.get("dense"))


def _error_clause(record: Mapping[str, Any]) -> str:
    layers = record["layers"]
    if not layers:
        return ""
    after, before = (fine_percent(fmean(layer[key] for layer in layers)) for key in ("error", "error_none"))
    if record["settings"]["order"] == NONE:
        return f"mean output error of a layer {before}; "
    return f"mean output error of a layer {after} against {before} without permutation; "


def measured_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table of results: `side_rows`, and what pruning did to the layers."""
    rows = side_rows(record)
    if layers := record["layers"]:
        kept, error = (
            [fine_percent(fmean(layer[key] for layer in layers)) for key in keys]
            for keys in (("kept_none", "kept"), ("error_none", "error"))
        )
        rows.append(("kept saliency, mean", "100 %", kept[0], kept[1]))
        rows.append(("output error, mean", "0 %", error[0], error[1]))
    return rows


def _pictures(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures of what a record has, at most three, as data URIs by the names that the page has for them."""
    drawn: dict[str, Figure] = {}
    if (measured := record["measured"]) is not None:
        values = (measured["dense"], measured["none"], measured["pruned"])
        drawn["measured"] = pictures.bars(*values, measured["metric"], record["settings"]["order"])
    if record["curve"]:
        drawn["search"] = pictures.learning_curve(record["curve"])
    if layers := record["layers"]:
        drawn["error"] = pictures.output_error(layers)
    return {name: data_uri(picture) for name, picture in drawn.items()}


def dense_sentence(weights: Mapping[str, Any] | None) -> str:
    """Describe what stayed dense inside the blocks, as a sentence; "" if nothing did or this was not recorded."""
    text = str(DenseWeights(**weights)) if weights else ""
    return f"{text}." if text else ""


def mix_sentences(record: Mapping[str, Any]) -> str:
    """Describe the patterns of a mix, and the runs that a limit of the loss took; "" if there is one pattern."""
    if (mix := record.get("mix")) is None:
        return ""
    layers = ", ".join(f"{count(held, 'layer')} {text}" for text, held in Counter(mix["layers"].values()).items())
    size = f"{mix['bytes'] / 1e6:,.1f} MB packed"
    sentences = [f"The mix keeps {fine_percent(mix['keep'])} of the weights of {layers}; {size}."]
    if uniform := mix.get("uniform"):
        others = ", ".join(f"{number(loss)} with {name} in every layer" for name, loss in uniform.items())
        sentences.append(f"Its held-out loss before the search is {number(mix['rounds'][-1])}; it is {others}.")
    for attempt in mix["attempts"]:
        value = number(attempt["chosen"])
        other = "" if attempt["confirmed"] is None else f", and {number(attempt['confirmed'])} on data for the result"
        if attempt.get("error"):
            other += f" (the standard error of the loss is {fine_percent(attempt['error'])})"
        sentences.append(f"With {fine_percent(attempt['keep'])}: {value} on the data for the choice{other}.")
    return " ".join(sentences)
