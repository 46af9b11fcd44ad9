"""Weights in huge pages of memory.

A product with one row of activations reads every weight once, so it is as fast as memory. With pages of 4 KiB a
processor spends a good part of that time looking up addresses, most of all in a virtual machine; huge pages, of 2 MiB
on x86-64, cover 512 times as much (`benchmarks/inference.py`). Linux gives them to memory that asks for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

HUGE = 1 << 21
"""Bytes of a huge page."""
ALIGNMENT = 64
"""Bytes to which tensors are aligned: a line of the processor's cache."""


def move_to_huge_pages(model: nn.Module) -> None:
    """Move the parameters and buffers of a model that are on the CPU into huge pages, in place.

    Parameters stay the same objects, and tensors that share memory still do; those of which others are a part are left
    where they are. Does nothing for models smaller than a huge page, or where the system has none to give.
    """
    found: dict[int, list[Tensor]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    whole = {at: own for at, own in found.items() if all(0 < t.nbytes == t.untyped_storage().nbytes() for t in own)}
    room = _room([own[0].nbytes for own in whole.values()])
    if room is None:
        return
    memory, starts = room
    places = dict(zip(whole, starts, strict=True))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if (start := places.get(parameter.untyped_storage().data_ptr())) is not None:
                parameter.data = _tensor_at(memory, start, parameter).copy_(parameter.data)
        for name, buffer in module._buffers.items():  # a new tensor: as a view, a buffer would keep its old memory
            if buffer is not None and (start := places.get(buffer.untyped_storage().data_ptr())) is not None:
                module._buffers[name] = _tensor_at(memory, start, buffer).copy_(buffer)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU in huge pages, or an ordinary one where there are none."""
    room = _room([tensor.nbytes])
    if room is None:
        return tensor.clone()
    memory, (start,) = room
    return _tensor_at(memory, start, tensor).copy_(tensor)


def _tensor_at(memory: mmap.mmap, start: int, like: Tensor) -> Tensor:
    """Return a tensor of the same shape and type as another in some memory."""
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)


def _room(sizes: Sequence[int]) -> tuple[mmap.mmap, list[int]] | None:
    """Return memory for tensors of these sizes in bytes, and where each begins; None if huge pages would not help."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or sum(sizes) < HUGE:
        return None
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    memory = mmap.mmap(-1, total + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without huge pages
        return None
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    return memory, [first + start for start in starts]
