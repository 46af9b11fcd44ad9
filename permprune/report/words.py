"""Numbers and outcomes as a person reads them."""

from __future__ import annotations

import math

from permprune.data.overlap import QUOTED
from permprune.evaluation.result import metric_named
from permprune.pattern import MIXED

DASH = "\N{EN DASH}"

NONE = "none"
"""The permuter, and the update, that changes nothing."""


def number(value: float | None) -> str:
    """Three or four significant digits: 30.09, 175.7, 12,400; a dash for None."""
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
    """A number without decimals; a dash for None."""
    return DASH if value is None else f"{value:.0f}"


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error, of which two digits count: 44.77 ± 0.90, 0.677 ± 0.024."""
    text = number(value)
    if error is None or not (math.isfinite(value) and math.isfinite(error)):
        return text
    if abs(value) >= 1e6:
        return f"{text} ± {error:.2g}"
    digits = len(text.partition(".")[2])
    if error > 0:
        digits = max(0, min(digits, 1 - math.floor(math.log10(error))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def percent(share: float | None) -> str:
    """A share of 1 in whole percent; a dash for None."""
    if share is None or not math.isfinite(share):
        return DASH
    whole = round(100 * share)
    return f"\N{MINUS SIGN}{-whole} %" if whole < 0 else f"{whole} %"


def fine_percent(share: float) -> str:
    """A share of 1 in percent with a decimal or two, for differences that whole percents would hide."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def count(number: int, thing: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def overlap_note(share: float | None) -> str:
    """What a reader must know of an evaluation of which such a share was calibrated on; "" where it is hardly any."""
    if share is None or share <= QUOTED:
        return ""
    return f"{percent(share)} of the evaluation is in the calibration as well: on other data pruned models do worse."


def duration(seconds: float | None) -> str:
    """Seconds up to two minutes, then minutes, then hours; a dash for None."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def way(pattern: str, method: str, update: str) -> str:
    """How a model was pruned, to begin a sentence with: "2:4 with newton, then sparsegpt"."""
    words = "A mix of patterns" if pattern == MIXED else pattern
    words += " in natural order" if method == NONE else f" with {method}"
    return words if update == NONE else f"{words}, then {update}"


def outcome(metric: str, pruned: float, dense: float, none: float | None) -> str:
    """What pruning left of a metric, as the end of a sentence; `none` is its value in natural order, where told apart.

    Where more is better: " keeps 97 % of the dense top-1 accuracy (...)", else ": perplexity 63.4 against ...".
    """
    if metric_named(metric).higher_is_better and math.isfinite(pruned) and dense > 0:
        beside = "" if none is None else f"; {number(none)} without permutation"
        return f" keeps {percent(pruned / dense)} of the dense {metric} ({number(pruned)} of {number(dense)}{beside})"
    beside = "" if none is None else f" and {number(none)} without permutation"
    return f": {metric} {number(pruned)} against {number(dense)} dense{beside}"


def trained(metric: str, before: float, after: float, error: float | None, dense: float | None) -> str:
    """What training after pruning made of a metric, as a sentence; `dense` is that of the teacher, if there was one."""
    value = with_error(after, error)
    if dense is None:
        return f"Trained after that: {metric} {value} against {number(before)} before."
    if metric_named(metric).higher_is_better and dense > 0:
        share = f"it keeps {percent(after / dense)} of the dense {metric}"
        return f"Trained after that {share} ({value} of {number(dense)}; {number(before)} before)."
    return f"Trained after that: {metric} {value} against {number(dense)} dense and {number(before)} before."


def better(metric: str) -> str:
    return f"{'higher' if metric_named(metric).higher_is_better else 'lower'} is better"
