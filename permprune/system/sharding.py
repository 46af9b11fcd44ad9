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
from permprune.system.distributed import shards


def local_rows(rows: int) -> slice:
    """Return the rows, of so many, that this process holds."""
    process, most = distributed.rank() if shards() > 1 else 0, -(-rows // shards())
    return slice(min(process * most, rows), min((process + 1) * most, rows))


def leaves_none_out(rows: int, processes: int) -> bool:
    """Whether each of so many processes gets at least one of the rows."""
    return (processes - 1) * -(-rows // processes) < rows


def add_(*tensors: Tensor) -> None:
    """Replace each tensor, a sum over the rows of this process, by the sum over all rows."""
    if shards() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers: float) -> tuple[float, ...]:
    """Return numbers that are sums over the rows of this process, summed over all rows."""
    if shards() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    add_(sums)
    return tuple(sums.tolist())


def gather_on_first(held: Tensor, rows: int) -> Tensor | None:
    """Return to the first process the whole of a tensor of which each process holds some rows; to the others None."""
    lacking = -(-rows // shards()) - len(held)  # all processes send as many rows
    sent = torch.cat([held, held.new_zeros(lacking, *held.shape[1:])])
    whole = None if distributed.rank() else sent.new_empty(shards() * len(sent), *sent.shape[1:])
    dist.gather(sent, None if whole is None else [*whole.chunk(shards())])
    return None if whole is None else whole[:rows]


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Return the tensor of one process, on every process; those of the others are overwritten."""
    if shards() > 1:
        dist.broadcast(tensor, owner)
    return tensor


def broadcast_name(name: str | None) -> str | None:
    """Return the name that the first process gives; those of the others are ignored."""
    names = [name]
    if shards() > 1:
        dist.broadcast_object_list(names)
    return names[0]
