"""Functions and commands in a process of their own, forked from one that has only imported what they need."""

import multiprocessing
import pkgutil
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from os import getpid, kill
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401

import permprune.jobs.evaluate
import permprune.jobs.finetune
import permprune.jobs.prune  # noqa: F401

from .cli.running import run


def forked(function: Callable[..., Any], *arguments: Any) -> tuple[int | None, Any]:
    """Call a function of a module in another process; returns the exit status, and the result or a traceback.

    The process is forked from one that has only imported what it needs: a fork of this one could not differentiate if a
    device other than the CPU was simulated here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(writer, torch.get_num_threads(), function, arguments))
    child.start()
    writer.close()
    try:
        result = reader.recv()
    except EOFError:
        result = "the process said nothing"
    child.join()
    return child.exitcode, result


def _send(writer: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        result = function(*arguments)
    except BaseException:
        result = traceback.format_exc()
    writer.send(result)


def run_until(place: str, call: int, *command: str | Path, patches: Mapping[str, object] | None = None) -> None:
    """Run a command in another process, which saves its state after each step, until a given call of a function.

    `patches` are attributes that have other values there.
    """
    values = {"permprune.system.search_state.EVERY": 0.0, **(patches or {})}
    status, ended = forked(_run, values, place, call, command)
    assert status == -signal.SIGKILL, ended


def _run(values: Mapping[str, object], place: str, call: int, command: tuple[str | Path, ...]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(name, value)
        calls(place, patch, last=call)
        return str(run(*command))


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
