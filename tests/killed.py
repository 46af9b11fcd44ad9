"""Commands that are killed in a given call of a function."""

import multiprocessing
import pkgutil
import signal
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from os import getpid, kill
from pathlib import Path

import pytest
import torch

from .cli.running import run


def run_until(place: str, call: int, *command: str | Path, patches: Mapping[str, object] | None = None) -> None:
    """Run a command in another process, which saves its state after each step, until a given call of a function.

    `patches` are attributes that have other values there. The process is forked from one that has only imported what
    it needs: a fork of this one could not differentiate if a device other than the CPU was simulated here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    values = {"permprune.system.search_state.EVERY": 0.0, **(patches or {})}
    child = context.Process(target=_run, args=(writer, torch.get_num_threads(), values, place, call, command))
    child.start()
    writer.close()
    try:
        ended = reader.recv()
    except EOFError:
        ended = "the process said nothing"
    child.join()
    assert child.exitcode == -signal.SIGKILL, ended


def _run(
    writer: Connection,
    threads: int,
    values: Mapping[str, object],
    place: str,
    call: int,
    command: tuple[str | Path, ...],
) -> None:
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(name, value)
        calls(place, patch, last=call)
        try:
            ended = str(run(*command))
        except BaseException:
            ended = traceback.format_exc()
    writer.send(ended)


def calls(place: str, patch: pytest.MonkeyPatch, last: int | None = None) -> list[int]:
    """A list that gets an element for each call of a function from now on; the `last` one kills this process."""
    owner, _, name = place.rpartition(".")
    original, found = getattr(pkgutil.resolve_name(owner), name), list[int]()

    def count(*args: object, **options: object) -> object:
        found.append(1)
        if len(found) == last:
            kill(getpid(), signal.SIGKILL)
        return original(*args, **options)

    patch.setattr(place, count)
    return found
