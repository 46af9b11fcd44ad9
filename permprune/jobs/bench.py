"""Benchmark checkpoints against the dense model: speed, size and memory, measured in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from torch import nn

from permprune.checkpoints.benchmark import BenchedModel, Benchmark
from permprune.checkpoints.io import read_as_stored
from permprune.checkpoints.offload import read_size
from permprune.checkpoints.record import RECORD, read_record
from permprune.errors import PermpruneError, first_line
from permprune.evaluation.size import stored_bytes
from permprune.evaluation.speed import STEPS, cells, measure_speed
from permprune.jobs.speeds import TYPES
from permprune.kv.cache import PrunedCache
from permprune.kv.files import OtherModelError
from permprune.kv.files import read_record as read_kv
from permprune.options import Count, require
from permprune.system.device import best_device, dtype_named, fast_dtype
from permprune.system.files import write_json
from permprune.system.memory import keep_activations
from permprune.system.progress import console, log, quiet_libraries, track

END = "end"
"""The request that ends a process."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A model to measure: its name or folder, the data type to convert it to, and its pruned cache."""

    source: str
    dtype: str | None
    threads: int
    trust_remote_code: bool
    reference: bool = False
    """Whether this is the dense model, which others are compared with."""
    kv: str | None = None

    @property
    def name(self) -> str:
        """The name of the row in the results."""
        name = self.source if self.dtype is None else f"{self.source} ({self.dtype})"
        return name if self.kv is None else f"{name} with {self.kv}"

    @property
    def dense(self) -> bool:
        """Whether this is the dense model with a dense cache."""
        return self.reference and self.kv is None


def bench(
    folders: Sequence[str | Path],
    *,
    dense: str | None = None,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    steps: int = STEPS,
    turns: int = 3,
    threads: int | None = None,
    kv: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Benchmark:
    """Benchmark checkpoints, also in bf16 where that is faster, against the dense model in fp32 and bf16.

    `dense` is the name of the dense model, by default the one in the record of the first folder. Every combination of
    `batches` and `contexts` (tokens of a prompt or text) is measured; the defaults are those of `evaluation.speed`. A
    causal language model generates `steps` tokens (`Speed`); others read a batch of inputs (`Throughput`). Each model
    is loaded in its own process. The processes are measured one at a time, in `turns` rounds, and the shortest time of
    the rounds is reported. `threads` is the number of threads of each process, by default PyTorch's. With `kv`, a
    folder that `permprune kv` wrote, those of the dense model in bf16 and the checkpoints that it was made for are
    measured with that pruned cache too; a warning names the others. Raises `PermpruneError`.
    """
    if isinstance(folders, str):  # a sequence of letters
        raise PermpruneError(f'folders is "{folders}": give a list of folders')
    given = {"batches": batches, "contexts": contexts, "steps": [steps], "turns": [turns]}
    for name, numbers in given.items():
        if numbers is not None and not numbers:
            raise PermpruneError(f"{name} is empty: give at least one number")
        for number in numbers or ():
            require(name, number, Count)
    threads = torch.get_num_threads() if threads is None else threads
    require("threads", threads, Count)
    reference = dense or _dense_of(folders)
    entries = [_Entry(reference, dtype, threads, trust_remote_code, reference=True) for dtype in TYPES]
    entries += [
        _Entry(str(folder), dtype, threads, trust_remote_code) for folder in folders for dtype in _types(Path(folder))
    ]
    if kv is not None:
        read_kv(Path(kv))
        cached = [entry for entry in entries if entry.dtype == ("bf16" if entry.dense else None)]
        entries += [dataclasses.replace(entry, kv=str(kv)) for entry in cached]
    with _served(entries) as served:
        speeds: list[dict[tuple[int, int], Any]] = [{} for _ in served]
        measured_at: list[tuple[int, int]] = _ask(served[0][1], "cells", batches, contexts, steps)
        order = [(cell, place) for cell in measured_at for _ in range(turns) for place in range(len(served))]
        for cell, place in track(order, "measuring"):
            speed = _ask(served[place][1], "speed", *cell, steps)
            speeds[place][cell] = speed.fastest(speeds[place].get(cell))
        rows = []
        for (entry, server), measured in zip(served, speeds, strict=True):
            size, resident = _ask(server, "memory")
            rows.append(BenchedModel(entry.name, entry.dense, size, resident, [*measured.values()]))
    return Benchmark(threads, "GPU" if torch.cuda.is_available() else "CPU", rows)


def report(benchmark: Benchmark, folder: str | Path) -> None:
    """Add the benchmark to the record of a folder; a folder without a record is left unchanged."""
    folder = Path(folder)
    if not (folder / RECORD).exists():
        return
    write_json(folder / RECORD, dataclasses.replace(read_record(folder), bench=benchmark).to_json())


def _types(folder: Path) -> list[str | None]:
    """The types to measure a checkpoint in: None, as it is stored, and bf16 where products in it are faster."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading it tells what is wrong
        return [None]
    stored = config.get("dtype", config.get("torch_dtype"))
    return [None, "bf16"] if stored == "float32" and fast_dtype(best_device()) == torch.bfloat16 else [None]


def _dense_of(folders: Sequence[str | Path]) -> str:
    if not folders:
        raise PermpruneError("there is nothing to measure: give at least one folder")
    if not (Path(folders[0]) / RECORD).exists():
        raise PermpruneError(f"{folders[0]} has no {RECORD}, which names the dense model: give it with --dense")
    return read_record(Path(folders[0])).model


@contextlib.contextmanager
def _served(entries: Sequence[_Entry]) -> Iterator[list[tuple[_Entry, Connection]]]:
    """Start one process per model, which load their models one after the other; yields the models and connections.

    Without the models that the pruned cache was not made for; raises `OtherModelError` if it was made for none.
    """
    context: Any = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # its imports take seconds
    served: list[tuple[_Entry, Connection]] = []
    refused: dict[str, OtherModelError] = {}
    processes = []
    try:
        for entry in track(entries, "loading"):
            connection, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, entry), daemon=True)
            with _without_main():
                process.start()
            other.close()
            processes.append(process)
            try:
                _receive(connection)
            except OtherModelError as error:
                refused[entry.name] = error
                continue
            served.append((entry, connection))
        if refused and not any(entry.kv for entry, _ in served):
            raise next(iter(refused.values()))
        for name, reason in refused.items():
            log.warning("%s is not measured: %s", name, reason)
        yield served
        for _, server in served:
            server.send(END)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A context in which started processes do not run the caller's script again.

    They would, to define what it defines; a script whose work is not under `if __name__ == "__main__":` would start
    processes of its own, which Python refuses.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _ask(server: Connection, *request: Any) -> Any:
    with contextlib.suppress(OSError):  # its process has ended: what it sent before says why, if anything
        server.send(request)
    return _receive(server)


def _receive(server: Connection) -> Any:
    try:
        reply = server.recv()
    except (EOFError, OSError):
        raise PermpruneError(
            "a process of the benchmark died, perhaps because memory ran out: measure fewer models, or smaller batches"
        ) from None
    if isinstance(reply, PermpruneError):
        raise reply
    return reply


def _serve(pipe: Connection, entry: _Entry) -> None:
    """Load a model and reply to requests, each a name and arguments: its cells, its speed in one of them, its memory.

    The memory is a pair: the bytes of its tensors, and the resident memory of the process in bytes. An error is sent
    as the reply, as a `PermpruneError`, and ends the process.
    """
    console.quiet = True
    quiet_libraries()
    torch.set_num_threads(entry.threads)
    keep_activations()  # of dense models, too
    try:
        model, _ = read_as_stored(entry.source, trust_remote_code=entry.trust_remote_code)
        if entry.dtype is not None:
            nn.Module.to(model, dtype_named(entry.dtype))
        size = read_size(entry.source, model, trust_remote_code=entry.trust_remote_code)
        cache = None if entry.kv is None else partial(PrunedCache.from_pretrained, entry.kv, model)
        if cache is not None:
            cache()
        replies: dict[str, Callable[..., Any]] = {
            "cells": partial(cells, model),
            "speed": lambda batch, context, steps: measure_speed(
                model, batch=batch, context=context, steps=steps, cache=cache, size=size
            ),
            "memory": lambda: (stored_bytes(model), psutil.Process().memory_info().rss),
        }
        pipe.send(None)  # it is ready
        while (request := pipe.recv()) != END:
            name, *arguments = request
            pipe.send(replies[name](*arguments))
    except PermpruneError as error:
        pipe.send(error)
    except Exception as error:  # a model's own code can raise any type
        pipe.send(PermpruneError(f"{entry.name} cannot be measured: {first_line(error)}"))
