"""Threads that stand for processes: collective operations among them work as those of `torchrun`'s processes do."""

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

T = TypeVar("T")


def in_processes(count: int, function: Callable[[], T]) -> list[T]:
    """The results of the function in so many ranks; if any raises an error, that of the lowest such rank is raised."""
    results, errors, store = dict[int, T](), dict[int, BaseException](), dist.HashStore()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
        try:
            results[rank] = function()
        except BaseException as error:
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # they wait for each other often
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        sys.setswitchinterval(interval)
    if errors:
        raise errors[min(errors)]
    return [results[rank] for rank in range(count)]
