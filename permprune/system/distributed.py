"""Distribution of work over the processes that `torchrun` starts, and over the threads of each process.

In a single process everything except `each` is a no-op.

By default every rank holds the whole model. Calibration batches and problems are distributed over the ranks in turn and
the results are combined, so that every rank has the same orders. Sums over batches equal those of a single process to
the last bit if the order of summation does not matter, as for the two batches of a round on two ranks.

Inside `dividing_rows` the ranks divide the rows of the weights instead (`permprune.system.sharding`). All of them then
run the same batches and solve the same problems at the same time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

from permprune.errors import PermpruneError
from permprune.system.failures import ENDED
from permprune.system.imports import on_first_use
from permprune.system.memory import release_freed_memory

with on_first_use(globals()):
    import torch
    from torch import Tensor
    from torch import distributed as dist

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=7)
"""How long ranks wait for one that writes, or solves a large problem; `torchrun` ends them if it has ended."""

_state = {"divided": False}


def rank() -> int:
    """Return the rank of this process; 0 for a single process."""
    return dist.get_rank() if _running() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _running() else 1


@contextmanager
def processes() -> Iterator[None]:
    """A context that joins the other ranks if `torchrun` started this process, with NCCL if there are GPUs, or gloo.

    If a process ends, `torchrun` terminates the others; the first of them then prints one line.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or _running():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        with _ending_on_sigterm():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def dividing_rows() -> Iterator[None]:
    """A context in which the ranks divide the rows of weights, and not examples and problems."""
    before = _state["divided"]
    _state["divided"] = True
    try:
        yield
    finally:
        _state["divided"] = before


def shards() -> int:
    """Return the number of processes that divide the rows of weights; 1 if each holds all rows."""
    return world() if _state["divided"] else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items of this rank: every `world()`-th one, starting with item `rank()`."""
    return items if _same_examples() else items[rank() :: world()]


def add_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks' shares of the examples."""
    if not _same_examples():
        for tensor in tensors:
            dist.all_reduce(tensor)


def adds_once() -> bool:
    """Whether this rank is the one that adds what `add_` is to count once."""
    return _same_examples() or not rank()


def total(*numbers: float) -> tuple[float, ...]:
    """Return the sum of each number over the ranks' shares of the examples; it is the same on every rank."""
    if not _running():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    if _same_examples():  # of the same examples: decisions must not differ by the rounding of kernels
        dist.broadcast(sums, 0)
    else:
        dist.all_reduce(sums)
    return tuple(sums.tolist())


def mean(number: float) -> float:
    """Return the mean over the ranks, for instance of times, so that all ranks use the same one."""
    return sum(gathered(number)) / world()


def merge(results: dict[str, T]) -> dict[str, T]:
    """Return the union of the results of the ranks' shares; they must be picklable, and tensors on the CPU."""
    if _same_examples():
        return results
    return {key: value for of_rank in gathered(results) for key, value in of_rank.items()}


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, which must be picklable."""
    if not _running():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def require_same(settings: Mapping[str, Any]) -> None:
    """Raise `PermpruneError` on every rank if the ranks have different settings, naming those that differ."""
    first, *others = gathered(dict(settings))
    names = sorted({key for other in others for key in first.keys() | other.keys() if first.get(key) != other.get(key)})
    if names:
        raise PermpruneError(
            f"the processes of this run differ in {', '.join(names)}: start all with the same command and files"
        )


def each(function: Callable[[T], R], items: Sequence[T], device: torch.device) -> Iterator[R]:
    """Yield the function's result for each item, in order.

    On a CPU as many items are processed at a time as torch has threads, each by one thread: small operations are faster
    side by side than one after another on all threads. Calls must not change what other calls read. Threads do not
    reuse memory that other threads have freed, so freed memory is released before they start and after they end. Where
    ranks divide rows, they process the items one after the other, as they have to exchange sums in the same order.
    """
    threads = torch.get_num_threads() if device.type == "cpu" and shards() == 1 else 1
    if threads == 1:
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    release_freed_memory()
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        release_freed_memory()
        torch.set_num_threads(threads)


def on_first(function: Callable[[], R], others: Callable[[], None] = lambda: None) -> R:
    """Call the function on the first rank only, and return its result, or raise its `PermpruneError`, on every rank.

    Meanwhile the other ranks call `others`.
    """
    if not _running():
        return function()
    outcome: list[Any] = [None, None]
    if rank():
        others()
    else:
        outcome[:] = _outcome(function)
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def on_all(function: Callable[[], R]) -> R:
    """Call the function on every rank and return its own result; a `PermpruneError` of one rank is raised on all."""
    result, error = _outcome(function)
    for other in gathered(error):
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def wait() -> None:
    """Wait until every rank has made this call."""
    if _running():
        dist.barrier()


def _outcome(function: Callable[[], R]) -> tuple[R | None, PermpruneError | None]:
    """Call a function; returns its result and the `PermpruneError` that it raised."""
    try:
        return function(), None
    except PermpruneError as error:
        return None, error


def _running() -> bool:
    return "torch.distributed" in sys.modules and dist.is_available() and dist.is_initialized()


def _same_examples() -> bool:
    """Whether all ranks have the same examples: there is one, or they divide rows."""
    return not _running() or _state["divided"]


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM ends this process at once, also while it waits for others; the first rank says why.

    Python runs signal handlers only between its own instructions, but writes the signal's number to a file at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait_for_signal() -> None:
        while (number := os.read(reader, 1)) != bytes([signal.SIGTERM]):
            if not number:
                return
        if not rank():
            os.write(2, f"permprune: {ENDED}\n".encode())
        os._exit(128 + signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = Thread(target=wait_for_signal, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        os.close(reader)
