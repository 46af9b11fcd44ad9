"""`python -m permprune`."""

from __future__ import annotations

from permprune.cli import app

app()
