"""Numbers as a person reads them."""

from __future__ import annotations

import math

DASH = "\N{EN DASH}"


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


def percent(share: float | None) -> str:
    """A share of 1 in whole percent; a dash for None."""
    if share is None or not math.isfinite(share):
        return DASH
    whole = round(100 * share)
    return f"\N{MINUS SIGN}{-whole} %" if whole < 0 else f"{whole} %"


def fine_percent(share: float) -> str:
    """A share of 1 in percent with a decimal or two, for differences that whole percents would hide."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


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
