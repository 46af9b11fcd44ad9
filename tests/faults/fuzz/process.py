"""Processes that run commands, and may die or hang."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT, GRACE = 120, 30
"""Seconds that a command may take, and those that its process gets to say so."""

MEMORY = 12 * 2**30
"""Bytes of address space that a process may take."""

RECYCLED = 40
"""Cases after which a process is replaced."""


class Hang(BaseException):
    """Ends a command that takes too long."""


def serve(pipe: Connection, root: Path) -> None:
    """Run the commands that come through a pipe, each a list of arguments and a working directory, until None comes.

    The reply has `status`, `stdout`, `stderr` and `trace`, or `hang`; `network` has the addresses that were asked for,
    and `noise` what was written past Python's streams.
    """
    noise = os.open(root / f"noise-{os.getpid()}", os.O_RDWR | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(noise, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ |= {"PERMPRUNE_CACHE": str(root / "cache"), "HF_HOME": str(root / "hub")}
    addresses: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        addresses.append(str(arguments[:2]))
        raise OSError("no network")

    socket.getaddrinfo = refuse  # type: ignore[assignment]
    socket.socket.connect = refuse  # type: ignore[method-assign]

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    import permprune.jobs.prune
    import permprune.jobs.verify  # noqa: F401 - that the commands import all this takes longer than they may
    from permprune.system.progress import console

    console.width = 200
    while (request := pipe.recv()) is not None:
        addresses.clear()
        os.ftruncate(noise, 0)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            reply = _run(*request)
        except Hang:
            reply = {"hang": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply["network"] = list(addresses)
        reply["noise"] = os.pread(noise, 5000, 0).decode(errors="replace")
        pipe.send(reply)


def _run(arguments: list[str], folder: Path) -> dict[str, Any]:
    from typer.testing import CliRunner

    from permprune.cli import app

    os.chdir(folder)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, Hang):
        raise result.exception
    trace = ""
    if result.exc_info and not isinstance(result.exception, (SystemExit, type(None))):
        trace = "".join(traceback.format_exception(*result.exc_info))
    return {"status": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "trace": trace}


class Worker:
    """A process that serves, and is replaced when it dies or hangs."""

    def __init__(self, root: Path) -> None:
        self.root, self.process, self.served = root, None, 0

    def run(self, arguments: list[str], folder: Path) -> dict[str, Any]:
        """Return the reply of `serve`, or `hang`, or `crash` with the exit code of the process."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process: Any = context.Process(target=serve, args=(theirs, self.root), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((arguments, folder))
            if not self.pipe.poll(LIMIT + GRACE):
                self.stop()
                return {"hang": True}
            return self.pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return {"crash": code}

    def rest(self) -> None:
        """Count a case, after which the process may be replaced."""
        self.served += 1
        if self.served % RECYCLED == 0:
            self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None
