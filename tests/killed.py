"""Commands that are killed in a given call of a function."""

import os
import pkgutil
import signal
import traceback
from pathlib import Path

import pytest
import torch

from .cli.running import run

FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
"""The mark of tests that call `kill`."""


def kill(place: str, call: int, *command: str | Path) -> None:
    """Run a command in a forked process, which saves its state after each step, until a given call of a function."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                torch.set_num_threads(1)
                patch.setattr("permprune.system.search_state.EVERY", 0.0)
                calls(place, patch, last=call)
                ended = str(run(*command))
        except BaseException:
            ended = traceback.format_exc()
        os.write(writer, ended[-60_000:].encode())
        os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader) as said:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, said.read()


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
