"""What a person reads after a run: pictures and one self-contained page."""

from permprune.report.page import render, write_comparison, write_report

__all__ = ["render", "write_comparison", "write_report"]
