"""`python -m permprune`."""

from permprune.cli import app

app()
