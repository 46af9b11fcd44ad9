"""Distribution of work over the processes that `torchrun` starts, and over the threads of each process.

In a single process everything except `each` is a no-op.

Calibration batches and problems are distributed over the ranks in turn and the results are combined, so that every rank
has the same orders. Sums over batches equal those of a single process to the last bit if the order of summation does
not matter, as for the two batches of a round on two ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from permprune.errors import PermpruneError
from permprune.system.memory import release_freed_memory

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    """Return the rank of this process; 0 for a single process."""
    return dist.get_rank() if _running() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _running() else 1


@contextmanager
def processes() -> Iterator[None]:
    """A context that joins the other ranks if `torchrun` started this process, with NCCL if there are GPUs, or gloo."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or _running():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cuda:nccl,cpu:gloo")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items of this rank: every `world()`-th one, starting with item `rank()`."""
    return items[rank() :: world()]


def add_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks."""
    if _running():
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers: float) -> tuple[float, ...]:
    """Return the sum of each number over the ranks."""
    if not _running():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def mean(number: float) -> float:
    """Return the mean over the ranks, for instance of times, so that all ranks use the same one."""
    return total(number)[0] / world()


def merge(found: dict[str, T]) -> dict[str, T]:
    """Return the union of the ranks' dicts; their values must be picklable, and tensors on the CPU."""
    if not _running():
        return found
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def common(items: Iterable[str]) -> set[str]:
    """Return the items that every rank has."""
    return set.intersection(*merge({str(rank()): set(items)}).values())


def each(function: Callable[[T], R], items: Sequence[T], device: torch.device) -> Iterator[R]:
    """Yield the function's result for each item, in order.

    On a CPU as many items are processed at a time as torch has threads, each by one thread: small operations are faster
    side by side than one after another on all threads. Calls must not change what other calls read. Threads do not
    reuse memory that other threads have freed, so freed memory is released before they start and after they end.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
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


def on_first(function: Callable[[], R]) -> R:
    """Call the function on the first rank only, and return its result, or raise its `PermpruneError`, on every rank."""
    if not _running():
        return function()
    answer: list[Any] = [None, None]
    if not rank():
        try:
            answer[0] = function()
        except PermpruneError as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    value, failure = answer
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


def wait() -> None:
    """Wait until every rank has made this call."""
    if _running():
        dist.barrier()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
