"""Commands that are killed in a given call of a function."""

import os
import pkgutil
import signal
from pathlib import Path

import pytest
import torch

from .cli.running import run

FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
"""The mark of tests that call `kill`."""


def kill(place: str, call: int, *command: str | Path) -> None:
    """Run a command in a forked process, which saves its state after each step, until a given call of a function."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                torch.set_num_threads(1)
                patch.setattr("permprune.system.search_state.EVERY", 0.0)
                calls(place, patch, last=call)
                run(*command)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def calls(place: str, patch: pytest.MonkeyPatch, last: int | None = None) -> list[int]:
    """A list that gets an element for each call of a function from now on; the `last` one kills this process."""
    owner, _, name = place.rpartition(".")
    original, found = getattr(pkgutil.resolve_name(owner), name), list[int]()

    def count(*args: object, **options: object) -> object:
        found.append(1)
        if len(found) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    patch.setattr(place, count)
    return found
