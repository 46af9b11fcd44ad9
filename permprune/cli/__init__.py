"""The command line: `permprune prune | compare | ablate | evaluate | verify | inspect`, one file a command."""

from permprune.cli import ablate, compare, evaluate, inspect, prune, verify  # noqa: F401 - each registers its command
from permprune.cli.common import app

__all__ = ["app"]
