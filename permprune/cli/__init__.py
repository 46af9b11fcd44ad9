"""The command line, a file for each command of `permprune`."""

from permprune.cli import (  # noqa: F401 - each registers its command
    bench,
    compare,
    evaluate,
    fetch,
    finetune,
    inspect,
    kv,
    methods,
    pack,
    plan,
    prune,
    push,
    verify,
)
from permprune.cli.common import app

__all__ = ["app"]
