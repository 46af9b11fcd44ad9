"""Numbers and results as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Column

from permprune.data.overlap import QUOTED
from permprune.evaluation.result import Result, metric_named
from permprune.pattern import MIXED
from permprune.system import progress

DASH = "\N{EN DASH}"

NONE = "none"
"""The permuter, and the update, that changes nothing."""

CHANGING = {"compensation": "compensation", "update": "an update", "blocks": "training", "training": "training"}
"""What changes the weights that are kept, by the stage of the search."""


def number(value: float | None) -> str:
    """Format a number with three or four significant digits: 30.09, 175.7, 12,400; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.3g}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4
    return f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    """Format a number without decimals; a dash for None."""
    return DASH if value is None else f"{value:.0f}"


def with_error(value: float, error: float | None) -> str:
    """Format a value and its standard error to two digits of the error: 44.77 ± 0.90, 0.677 ± 0.024."""
    text = number(value)
    if error is None or not (math.isfinite(value) and math.isfinite(error)):
        return text
    if abs(value) >= 1e6:
        return f"{text} ± {error:.2g}"
    digits = len(text.partition(".")[2])
    if error > 0:
        digits = max(0, min(digits, 1 - math.floor(math.log10(error))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def result_text(result: Result) -> str:
    """Return a result as text: perplexity 44.77 ± 0.90 on 1200 tokens."""
    return f"{result.metric} {with_error(result.value, result.stderr)} on {result.count} {result.unit}"


def percent(share: float | None) -> str:
    """Format a share of 1 in whole percent; a dash for None."""
    if share is None or not math.isfinite(share):
        return DASH
    whole = round(100 * share)
    return f"\N{MINUS SIGN}{-whole} %" if whole < 0 else f"{whole} %"


def fine_percent(share: float) -> str:
    """Format a share of 1 in percent with one or two decimals, for small differences."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def columns(*titles: str) -> list[Column]:
    """Return the columns of a table for the terminal that hold numbers, which are aligned at the right."""
    return [Column(title, justify="right") for title in titles]


def count(number: int, thing: str) -> str:
    """Format a number with its noun: "1 layer", "2 layers"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def overlap_note(share: float | None) -> str:
    """Return a warning that a share of the evaluation data was used for calibration; "" if the share is negligible."""
    if share is None or share <= QUOTED:
        return ""
    note = "of the evaluation data are also in the calibration data: pruned models do worse on other data."
    return f"{percent(share)} {note}"


def kept_weights(record: Mapping[str, Any]) -> str:
    """Say, as a sentence, whether the weights that were kept have changed: in the search, by an update or after it."""
    kept = [point.get("stage") for point in record["curve"] if point["kept"]]
    changes = [CHANGING[stage] for stage in kept if stage in CHANGING]
    if record["settings"]["update"] != NONE and "update" not in {point.get("stage") for point in record["curve"]}:
        changes.append(record["settings"]["update"])  # by an earlier release, whose curve has no updates
    changes += ["training"] if (record.get("optimised") or {}).get("train") == "all" else []
    if not changes:
        return "The weights that are kept have the values that they have in the dense model."
    return f"The weights that are kept were changed by {' and '.join(dict.fromkeys(changes))}."


def duration(seconds: float | None) -> str:
    """Format a duration in seconds, minutes or hours; a dash for None."""
    return DASH if seconds is None else progress.duration(seconds)


def way(pattern: str, method: str, update: str, train: str = NONE) -> str:
    """Describe how a model was pruned, as the start of a sentence: "2:4 with newton, then sparsegpt"."""
    mix, _, share = pattern.partition("@")
    words = pattern if mix != MIXED else f"A mix of patterns that keeps {share}" if share else "A mix of patterns"
    words += " in natural order" if method == NONE else f" with {method}"
    then = [update] * (update != NONE) + ["training"] * (train != NONE)
    return ", then ".join([words, *then])


def outcome(metric: str, pruned: float, dense: float, none: float | None) -> str:
    """Describe a metric after pruning, as the end of a sentence; `none` is its value in natural order, if it differs.

    If higher is better: " keeps 97 % of the dense top-1 accuracy (...)", otherwise ": perplexity 63.4 against ...".
    """
    if metric_named(metric).higher_is_better and math.isfinite(pruned) and dense > 0:
        beside = "" if none is None else f"; {number(none)} without permutation"
        return f" keeps {percent(pruned / dense)} of the dense {metric} ({number(pruned)} of {number(dense)}{beside})"
    beside = "" if none is None else f" and {number(none)} without permutation"
    return f": {metric} {number(pruned)} against {number(dense)} dense{beside}"


def trained(metric: str, before: float, after: float, error: float | None, dense: float | None) -> str:
    """Describe a metric after training that followed pruning, as a sentence; `dense` is the teacher's value, if any."""
    value = with_error(after, error)
    if dense is None:
        return f"Trained after that: {metric} {value} against {number(before)} before."
    if metric_named(metric).higher_is_better and dense > 0:
        share = f"it keeps {percent(after / dense)} of the dense {metric}"
        return f"Trained after that {share} ({value} of {number(dense)}; {number(before)} before)."
    return f"Trained after that: {metric} {value} against {number(dense)} dense and {number(before)} before."


def better(metric: str) -> str:
    """Return "higher is better" or "lower is better"."""
    return f"{'higher' if metric_named(metric).higher_is_better else 'lower'} is better"
