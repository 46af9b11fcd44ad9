"""What a person reads after a run: pictures and one self-contained page."""

from permprune.report.comparison import comparison_title, write_comparison
from permprune.report.run import decision, render, write_report
from permprune.report.sweep import render_sweep, sweep_decision, write_sweep
from permprune.report.words import duration, fine_percent, number, overlap_note, percent, whole, with_error

__all__ = [
    "comparison_title",
    "decision",
    "duration",
    "fine_percent",
    "number",
    "overlap_note",
    "percent",
    "render",
    "render_sweep",
    "sweep_decision",
    "whole",
    "with_error",
    "write_comparison",
    "write_report",
    "write_sweep",
]
