"""The command line: `permprune prune | compare | sweep | ablate | evaluate | verify | inspect | probe`, a file each."""

from permprune.cli import ablate, compare, evaluate, inspect, probe, prune, sweep, verify  # noqa: F401 - each registers its command
from permprune.cli.common import app

__all__ = ["app"]
