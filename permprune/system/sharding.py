"""Rows of weights that the processes of a run divide among them (`permprune.system.distributed.dividing_rows`).

Of every large weight each process holds a run of consecutive rows, all of the same number except for the last ones.
What a search minimises is a sum over rows: each process computes the terms of its own rows, and only sums are
exchanged. Where each process holds all rows, the functions here change nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from permprune.system import distributed
from permprune.system.distributed import connected, shards


def own_rows(rows: int, process: int | None = None) -> slice:
    """Return the rows, of so many, that a process holds, by default this one."""
    process, size = distributed.rank() if process is None else process, _most(rows)
    return slice(0, rows) if shards() == 1 else slice(min(process * size, rows), min((process + 1) * size, rows))


def leaves_none_out(rows: int, processes: int) -> bool:
    """Whether each of so many processes gets at least one of the rows."""
    return (processes - 1) * -(-rows // processes) < rows


def add_(*tensors: Tensor) -> None:
    """Replace each tensor, a sum over the rows of this process, by the sum over all rows."""
    if shards() > 1:
        with connected():
            for tensor in tensors:
                dist.all_reduce(tensor)


def total(*numbers: float) -> tuple[float, ...]:
    """Return numbers that are sums over the rows of this process, summed over all rows."""
    if shards() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    add_(sums)
    return tuple(sums.tolist())


def gather(part: Tensor, rows: int, dim: int = 0) -> Tensor:
    """Return the whole of a tensor of which each process has its own rows along `dim`; on every process."""
    if shards() == 1:
        return part
    own = _padded(part, rows, dim)
    parts = [torch.empty_like(own) for _ in range(shards())]
    with connected():
        dist.all_gather(parts, own)
    return torch.cat(parts, dim).narrow(dim, 0, rows)


def gather_on_first(part: Tensor, rows: int) -> Tensor | None:
    """Like `gather` along the first dimension, for the first process; the others return None."""
    if shards() == 1:
        return part
    own = _padded(part, rows, 0)
    whole = None if distributed.rank() else own.new_empty(shards() * len(own), *own.shape[1:])
    with connected():
        dist.gather(own, None if whole is None else [*whole.chunk(shards())])
    return None if whole is None else whole[:rows]


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Return the tensor of one process, on every process; those of the others are overwritten."""
    if shards() > 1:
        with connected():
            dist.broadcast(tensor, owner)
    return tensor


def tell(text: str | None) -> str | None:
    """Return what the first process tells; the argument of the others is ignored."""
    told = [text]
    if shards() > 1:
        with connected():
            dist.broadcast_object_list(told)
    return told[0]


def _most(rows: int) -> int:
    """The largest number of rows of a process."""
    return -(-rows // shards())


def _padded(part: Tensor, rows: int, dim: int) -> Tensor:
    """A contiguous copy of a part, or the part, with zeros for the rows that it lacks: all processes send as many."""
    lacking = _most(rows) - part.shape[dim]
    if not lacking:
        return part.contiguous()
    shape = [*part.shape]
    shape[dim] = lacking
    return torch.cat([part, part.new_zeros(shape)], dim)
