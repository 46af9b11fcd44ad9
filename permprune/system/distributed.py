"""Work shared among the processes that `torchrun` starts, and among the threads of each.

Alone, all but `each` does nothing.

Calibration batches and problems are dealt to the ranks in turn and the results are brought together, so that every
rank holds the same orders. Sums over batches are those of one process to the last bit where their order does not
matter, as for the two batches of a round on two ranks.
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
    return dist.get_rank() if _running() else 0


def world() -> int:
    return dist.get_world_size() if _running() else 1


@contextmanager
def processes() -> Iterator[None]:
    """Join the other ranks where `torchrun` started this process: over NCCL where there are GPUs, else gloo."""
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
    """The items of this rank: every `world`-th, from its own number on."""
    return items[rank() :: world()]


def add_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks."""
    if _running():
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers: float) -> tuple[float, ...]:
    """The sums over the ranks."""
    if not _running():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def mean(number: float) -> float:
    """The mean over the ranks, so that all go by one clock."""
    return total(number)[0] / world()


def merge(found: dict[str, T]) -> dict[str, T]:
    """The union of the ranks' dicts, which hold objects that pickle, tensors on the CPU among them."""
    if not _running():
        return found
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def common(items: Iterable[str]) -> set[str]:
    """The items that every rank has."""
    return set.intersection(*merge({str(rank()): set(items)}).values())


def each(function: Callable[[T], R], items: Sequence[T], device: torch.device) -> Iterator[R]:
    """The function of each item, in order.

    On a CPU as many are worked on at a time as torch has threads, with one thread for each: small operations go faster
    side by side than one after another on all threads. The function must not change what the others read. Threads do
    not reuse what others have freed: it is released before they begin and when they have ended.
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
    """What the function returns on the first rank, or the `PermpruneError` that it raises there, on every rank."""
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
    """Until every rank is here."""
    if _running():
        dist.barrier()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
