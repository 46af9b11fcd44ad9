"""What a person reads after a run: pictures and one self-contained page."""

from permprune.report.page import comparison_title, decision, render, write_comparison, write_report
from permprune.report.words import number

__all__ = ["comparison_title", "decision", "number", "render", "write_comparison", "write_report"]
