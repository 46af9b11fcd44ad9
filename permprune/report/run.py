"""The HTML page of a run: the result in a sentence, then pictures, then settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from permprune.models.layers import DenseWeights
from permprune.report import maps, pictures
from permprune.report.page import Shown, fill, shown
from permprune.report.speed import decode_bars, short_name, summary
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
        stages=_stages(record["curve"]),
        dense=dense_sentence(record.get("dense")),
        pictures=_pictures(record),
        times={name: duration(seconds) for name, seconds in record["seconds"].items()},
        spaces=_spaces(record),
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
    method = settings["permute"]
    run = way(settings["pattern"], method, settings["update"])
    if measured is None:
        return f"{run}: {_error_clause(record)}the network was not measured."
    none = None if method == NONE else measured["none"]
    sentence = run + outcome(measured["metric"], measured["pruned"], measured["dense"], none)
    gap = "" if method == NONE else _gap(record["gap_closed"])
    return f"{sentence}{gap}."


def _then_trained(record: Mapping[str, Any]) -> str:
    """Summarise training after pruning in one sentence; "" if there was none."""
    if (optimised := record.get("optimised")) is None:
        return ""
    metric, before, after, error = (optimised[key] for key in ("metric", "before", "after", "stderr"))
    return trained(metric, before, after, error, optimised.get("dense"))


def _gap(closed: float | None) -> str:
    if closed is None:
        return ""
    return f": {percent(closed)} of the gap closed" if closed >= 0 else f": the gap is {percent(-closed)} wider"


def _error_clause(record: Mapping[str, Any]) -> str:
    layers = record["layers"]
    if not layers:
        return ""
    after, before = (fine_percent(fmean(layer[key] for layer in layers)) for key in ("error", "error_none"))
    if record["settings"]["permute"] == NONE:
        return f"mean output error of a layer {before}; "
    return f"mean output error of a layer {after} against {before} without permutation; "


def measured_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table of results: name; dense; pruned in natural order; pruned as permuted."""
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


def _stages(curve: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of what each stage of a search brought: name; rounds; rounds kept; held-out loss.

    The first row has the loss of the orders that the search started from, and the others how far each stage lowered it.
    """
    if not curve:
        return []
    best = curve[0]["loss"]
    gains: dict[str, list[float]] = {}
    for point in curve[1:]:
        gains.setdefault(point.get("stage", "search"), []).append(best - point["loss"] if point["kept"] else 0.0)
        best = point["loss"] if point["kept"] else best
    rows = [
        (name, str(len(lowered)), str(sum(map(bool, lowered))), f"\N{MINUS SIGN}{math.fsum(lowered):.3f}")
        for name, lowered in gains.items()
    ]
    return [("start", "", "", f"{curve[0]['loss']:.3f}"), *rows, ("end", "", "", f"{best:.3f}")]


def _pictures(record: Mapping[str, Any]) -> list[Shown]:
    drawn: list[Shown] = []
    if (measured := record["measured"]) is not None:
        values = (measured["dense"], measured["none"], measured["pruned"])
        picture = pictures.bars(*values, measured["metric"], record["settings"]["permute"])
        text = f"{measured['count']:,} {measured['unit']} of {measured['data']}."
        drawn.append(shown(measured["metric"].capitalize(), text, picture))
    if record["curve"]:
        text = "Each round is kept only if the loss on held-out calibration data falls."
        drawn.append(shown("Search", text, pictures.learning_curve(record["curve"])))
    if optimised := record.get("optimised"):
        picture = pictures.epochs(optimised["curve"], optimised["metric"], optimised.get("dense"))
        drawn.append(shown("Optimised", _optimised(optimised), picture))
    if figures := record.get("bench"):
        drawn.append(shown("Speed", _speed(figures), decode_bars(figures)))
    if layers := record["layers"]:
        text = "Share of the squared saliency that the mask keeps, layer by layer. Higher is better."
        drawn.append(shown("Kept saliency", text, maps.kept_saliency(layers)))
        text = "Squared error of each layer's output, relative to the output. Lower is better."
        drawn.append(shown("Output error", text, pictures.output_error(layers)))
        if len({layer["pattern"] for layer in layers}) > 1:
            text = "Layers that affect the loss more keep more weights; layers that share an order share a pattern."
            drawn.append(shown("Pattern of each layer", text, maps.patterns(layers)))
    if sample := record["sample"]:
        text = (
            f"A few weights of {sample['layer']}, in groups of {sample['m']}: stronger colors are more salient. "
            f"In total it keeps {fine_percent(sample['kept_none'])} of its saliency in natural order, "
            f"{fine_percent(sample['kept'])} as permuted."
        )
        drawn.append(shown("What the order changes", text, maps.sample(sample)))
    return drawn


def _speed(figures: Mapping[str, Any]) -> str:
    """Describe a benchmark: every checkpoint of its run beside the dense model."""
    rows = [row for row in figures["rows"] if not row["dense"]]
    sentences = [f"{short_name(row['name'])}: {summary(figures, row)}." for row in rows]
    return f"On {figures['threads']} threads of the {figures['device']}. {' '.join(sentences)}"


def _optimised(optimised: Mapping[str, Any]) -> str:
    """Describe the training after pruning."""
    what = {"all": "the weights that are kept", "norms": "norms, biases and the head", "head": "the head"}
    return (
        f"Training {what[optimised['train']]} on {count(optimised['examples'], 'example')} after pruning, measured on "
        f"{optimised['count']:,} {optimised['unit']} held out. The best epoch was kept; all other figures on this "
        "page were measured before training."
    )


def dense_sentence(weights: Mapping[str, Any] | None) -> str:
    """Describe what stayed dense inside the blocks, as a sentence; "" if nothing did or this was not recorded."""
    text = str(DenseWeights(**weights)) if weights else ""
    return f"{text}." if text else ""


def _spaces(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table of permutations: name; storage; blocks; channels of a block; share that moved."""
    orders = [(name, "folded", table) for name, table in record["permutations"].items()]
    orders += [(gather["site"], "gather", [gather["order"]]) for gather in record["gathers"]]
    moved = [fmean(place != channel for block in table for place, channel in enumerate(block)) for *_, table in orders]
    return [
        (name, how, f"{len(table):,}", f"{len(table[0]):,}", percent(share))
        for (name, how, table), share in zip(orders, moved, strict=True)
    ]
